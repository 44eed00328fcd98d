"""The numbers of deleted passages: vectors have no delete, so their search leaves these out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shoulders.errors import ArtefactError
from shoulders.files import atomic_path


def read_numbers(folder: Path, name: str | None) -> list[int]:
    """Return the numbers in a file, ascending; none where there is no file."""
    if name is None:
        return []
    try:
        return [int(n) for n in np.fromfile(folder / name, dtype="<u8")]
    except OSError as error:
        raise ArtefactError(f"{folder / name}: cannot read: {error.strerror or error}") from error


def write_numbers(folder: Path, generation: int, numbers: list[int]) -> str | None:
    """Write the numbers to the file of a generation; return its name, None for no numbers."""
    if not numbers:
        return None
    name = f"deleted-{generation:04}.u64"
    with atomic_path(folder / name) as temporary:
        np.asarray(sorted(numbers), dtype="<u8").tofile(temporary)
    return name
