"""Ids by number: one file of UTF-8 and one of where each id ends; both only ever grow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shoulders.files import writing_to

IDS, ENDS = "ids.utf8", "ids.ends"
_END = np.dtype("<u8")


class IdWriter:
    """Appends ids; `cut` first takes back what a killed process wrote and did not commit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def cut(self, rows: int) -> None:
        """Keep the first `rows` ids."""
        ends = _ends(self._folder, rows)
        with writing_to(self._folder):
            for name, size in ((IDS, int(ends[-1]) if rows else 0), (ENDS, rows * _END.itemsize)):
                path = self._folder / name
                if not path.is_file() or path.stat().st_size > size:
                    with path.open("ab") as file:
                        file.truncate(size)

    def append(self, ids: Iterable[str]) -> None:
        """Append ids and see them on the disk."""
        raw = [passage_id.encode() for passage_id in ids]
        with (
            writing_to(self._folder),
            (self._folder / IDS).open("ab") as file,
            (self._folder / ENDS).open("ab") as ends,
        ):
            places = file.tell() + np.cumsum([len(r) for r in raw], dtype=_END)
            file.write(b"".join(raw))
            ends.write(places.astype(_END).tobytes())
            for handle in (file, ends):
                handle.flush()
                os.fsync(handle.fileno())


class Ids:
    """The first `rows` ids, memory-mapped."""

    def __init__(self, folder: Path, rows: int) -> None:
        self._ends = _ends(folder, rows)
        size = int(self._ends[-1]) if rows else 0
        self._raw = _mapped(folder / IDS, np.dtype("u1"), size).data

    def take(self, numbers: Sequence[int]) -> list[str]:
        """Return the ids with these numbers."""
        if not len(numbers):
            return []
        wanted = np.asarray(numbers, dtype=np.int64)
        ends = self._ends[wanted].tolist()
        starts = np.where(wanted > 0, self._ends[np.maximum(wanted - 1, 0)], 0).tolist()
        return [bytes(self._raw[s:e]).decode() for s, e in zip(starts, ends, strict=True)]


def _ends(folder: Path, rows: int) -> np.ndarray:
    return _mapped(folder / ENDS, _END, rows)


def _mapped(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not count:  # an empty file cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r", shape=(count,)).view(np.ndarray)
