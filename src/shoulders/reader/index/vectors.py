"""The dense vectors of an index, by number: one file that only grows, memory-mapped."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from shoulders.errors import DataError
from shoulders.files import writing_to


def vectors_name(dtype: str) -> str:
    """Return the name of the file for vectors of this type."""
    return f"vectors.{dtype}"


class VectorFile:
    """Rows of `dimensions` numbers; a killed process may leave a part of a row at the end."""

    def __init__(self, path: Path, dimensions: int, dtype: str) -> None:
        self._path = path
        self._dimensions = dimensions
        self._dtype = np.dtype(dtype).newbyteorder("<")

    @property
    def rows(self) -> int:
        """Number of whole rows."""
        size = self._path.stat().st_size if self._path.is_file() else 0
        return size // (self._dimensions * self._dtype.itemsize)

    def cut(self, rows: int) -> None:
        """Keep the first `rows` rows."""
        size = rows * self._dimensions * self._dtype.itemsize
        if self._path.is_file() and self._path.stat().st_size <= size:
            return
        with writing_to(self._path), self._path.open("ab") as file:
            file.truncate(size)

    def append(self, vectors: np.ndarray) -> None:
        """Append `[n, dimensions]` and see it on the disk."""
        with np.errstate(over="ignore"):
            stored = vectors.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise DataError(
                f"{self._path}: the encoder's vectors are not finite as {self._dtype.name}"
            )
        with writing_to(self._path), self._path.open("ab") as file:
            file.write(stored.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def mapped(self, rows: int) -> np.ndarray:
        """Return the first `rows` rows `[rows, dimensions]`, read from the disk as needed.

        The array may be written to without changing the file: torch takes no read-only ones.
        """
        shape = (rows, self._dimensions)
        return np.memmap(self._path, self._dtype, mode="c", shape=shape).view(np.ndarray)
