"""What building an index will need, from measured bytes per passage (docs/scale.md)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from shoulders.errors import ShouldersError
from shoulders.reader.collections.source import Estimate
from shoulders.reader.index.plan import Sizes

# Measured with Wikipedia passages of 100 words. Segments that are merged stand on the disk twice.
STORE_PER_TEXT_BYTE = 1.25
MERGING = 1.0  # of the store, for a while
ID_BYTES = 20
CODE_BYTES = 64  # of a passage in the approximate index
_PROCESS = 150_000_000
_ENCODING = 1_000_000_000  # torch, an encoder of the size of MiniLM and its activations
_PER_BATCH_BYTE = 3  # a passage in Python, and the same once more on its way


class Needs(NamedTuple):
    """Guesses for a build: passages, bytes on disk at the end and at most, bytes of memory."""

    passages: int
    disk: int
    disk_peak: int
    memory: int

    def shown(self) -> str:
        """Return the needs as one line for people."""
        return (
            f"about {self.passages:,} passages; needs {amount(self.disk_peak)} of disk "
            f"({amount(self.disk)} when finished) and {amount(self.memory)} of memory"
        )


def needs(
    estimate: Estimate,
    sizes: Sizes,
    *,
    dimensions: int = 0,
    item_bytes: int = 2,
    approximate: bool = False,
) -> Needs:
    """Return the needs of adding a source; `dimensions` is 0 where there is no dense half."""
    count, text = estimate
    store = int(text * STORE_PER_TEXT_BYTE) + count * ID_BYTES
    vectors = count * dimensions * item_bytes
    codes = count * CODE_BYTES if approximate else 0
    batch = min(sizes.batch, count) * (text // max(count, 1)) * _PER_BATCH_BYTE
    memory = _PROCESS + sizes.heap + batch
    if dimensions:
        # The approximate index is trained on a sample, and built in memory.
        memory = max(memory, _PROCESS + _ENCODING, _PROCESS + codes * 2 + _ENCODING)
    disk = store + vectors + codes
    return Needs(count, disk, disk + int(store * MERGING), memory)


def check_disk(folder: Path, wanted: Needs, written: int = 0) -> None:
    """Raise `ShouldersError` where the disk of `folder` cannot hold what is wanted.

    `written` bytes of it are there already.
    """
    free = shutil.disk_usage(folder).free
    if wanted.disk_peak > free + written:
        raise ShouldersError(
            f"{folder}: the disk has {amount(free)} free, the index needs about "
            f"{amount(wanted.disk_peak)} while it is built; choose another --out or make room"
        )


def amount(size: float) -> str:
    """Return a number of bytes for people: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
