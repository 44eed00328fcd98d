"""What a source of passages is, and how one is opened by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from shoulders.errors import DataError
from shoulders.reader.passage import Passage

Note = Callable[[str], None]  # is told one line about what was left out, and why


class Sourced(NamedTuple):
    """A passage, and the place it was read from (`file:line`, or a document) for messages."""

    passage: Passage
    place: str


class Estimate(NamedTuple):
    """What a source seems to hold, from the size of its files: passages, and bytes of text."""

    passages: int
    text_bytes: int


class Source(Protocol):
    """Passages in a fixed order, read one at a time: memory does not grow with their number."""

    kind: str
    path: Path

    def read(self, note: Note) -> Iterator[Sourced]:
        """Yield every passage; the same ones in the same order each time.

        Raises `DataError`, naming file and line, where something cannot be read.
        """
        ...

    def estimate(self) -> Estimate:
        """Return a quick guess of what `read` will yield."""
        ...


def open_source(path: Path, *, words: int | None = None) -> Source:
    """Return the source at `path`; nothing of it is read yet.

    A `.tsv` is DPR's table of passages, a `.jsonl` BEIR's corpus or our own passages (both may be
    compressed with gzip), anything else a document or a folder of documents.

    Args:
        path: a file or folder.
        words: size of the passages that documents are cut into, in words; tables are cut already.

    Raises:
        DataError: there is nothing of a known kind.
    """
    from shoulders.reader.collections.documents import SUFFIXES
    from shoulders.reader.collections.folder import Folder
    from shoulders.reader.collections.tables import DprTable, JsonLines

    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        corpus = path / "corpus.jsonl"  # a data set in BEIR's layout
        return JsonLines(corpus) if corpus.is_file() else Folder(path, words)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".tsv"):
        return DprTable(path)
    if name.endswith(".jsonl"):
        return JsonLines(path)
    if path.suffix.lower() in SUFFIXES:
        return Folder(path, words)
    known = ", ".join([".tsv", ".jsonl", *sorted(SUFFIXES)])
    raise DataError(f"{path}: cannot read '{path.suffix}' files; known are {known} and folders")
