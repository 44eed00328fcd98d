"""Whether whoever asked has left, while the answer is not begun."""

from __future__ import annotations

import asyncio
from typing import Self

from fastapi import Request


class Leaving:
    """Sees a client leave whose request has been read.

    `Request.is_disconnected` sees nothing behind a middleware: it gives up before the message that
    a middleware has wrapped is there. Once a response is begun it listens itself.

    Examples:
        with Leaving(request) as gone:
            if await gone(): ...
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    def __enter__(self) -> Self:
        self._watching = asyncio.create_task(self._watch())
        return self

    def __exit__(self, *_: object) -> None:
        self._watching.cancel()

    async def __call__(self) -> bool:
        """Tell whether it has left."""
        return self._watching.done() and not self._watching.cancelled()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
