"""Memory that training frees and takes again at every step: what to do about it once.

glibc gives large pieces back to the system when they are freed, and each thread has a heap of its
own; taking them again costs a page fault for every 4 kB, as much as a tenth of a step. And
Python looks through every object that is there, hundreds of thousands of them, for cycles among
what the steps have made, which takes as much.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # as in glibc's malloc.h
_LARGEST = 32 * 1024 * 1024  # what glibc allows for _MMAP


def keep_freed_memory() -> None:
    """Keep what is freed, in one heap for all threads; call before threads are started.

    Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        setting = ctypes.CDLL(None).mallopt
        setting(_ARENAS, 1)
        setting(_MMAP, _LARGEST)
        setting(_TRIM, 2**31 - 1)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Leave all objects that are there now out of the search for cycles, while this lasts.

    They are freed as ever when nothing refers to them any more.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
