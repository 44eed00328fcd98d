"""Opening what a user names with `--index`: an index of ours, or an engine's table."""

from __future__ import annotations

from pathlib import Path

from shoulders.reader.engines.lance import LanceTable, is_lance
from shoulders.reader.index.index import Index


def open_passages(where: str) -> Index | LanceTable:
    """Return the passages at `where`: a folder, or a URI that LanceDB connects to.

    Raises `ArtefactError` where there is none, or a part of it is missing.
    """
    return LanceTable(where) if is_lance(where) else Index(Path(where))
