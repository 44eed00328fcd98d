"""Memory that training frees and takes again at every step: ask the C library to keep it.

glibc gives large pieces back to the system when they are freed, and each thread has a heap of its
own; taking them again costs a page fault for every 4 kB, as much as a tenth of a step.
"""

from __future__ import annotations

import contextlib
import ctypes

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
