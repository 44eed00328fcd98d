"""Sockets to serve on, bound before anything is loaded: a port in use is said at once."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from shoulders.errors import ShouldersError


def bound(host: str, port: int) -> list[socket.socket]:
    """Bind all addresses of a host to one port, as asyncio would; 0 takes a free one.

    Nobody can connect yet. Raises `ShouldersError` where the port is in use.
    """
    found: list[socket.socket] = []
    missing = OSError(f"no address of {host}")
    with _telling(host, port):
        addresses = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, kind, protocol, _, address in dict.fromkeys(addresses):
            taken = found[0].getsockname()[1] if found else port
            try:
                found.append(_bound(family, kind, protocol, (address[0], taken, *address[2:])))
            except OSError as error:
                # A name may also stand for an address that this machine does not have.
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
        if not found:
            raise missing
    return found


def listen(sockets: Sequence[socket.socket], backlog: int, host: str, port: int) -> None:
    """Let clients connect; raises `ShouldersError` where another process was faster."""
    with _telling(host, port):
        for one in sockets:
            one.listen(backlog)


@contextmanager
def _telling(host: str, port: int) -> Iterator[None]:
    """Name the address that cannot be listened on."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise ShouldersError(f"--host {host} --port {port}: {why}") from None


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share the port with others
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError:
        one.close()
        raise
    return one
