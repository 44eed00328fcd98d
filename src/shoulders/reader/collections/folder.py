"""A folder of documents (or a single one), cut into passages."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shoulders.errors import DataError
from shoulders.reader.collections.cut import cut
from shoulders.reader.collections.documents import SUFFIXES, UnreadableError, read_document
from shoulders.reader.collections.source import Estimate, Note, Sourced
from shoulders.reader.passage import Passage

# Bytes of a file for each byte of its text; a PDF's share varies most (fonts, pictures).
_BYTES_PER_TEXT_BYTE = {".html": 3.0, ".htm": 3.0, ".xhtml": 3.0, ".pdf": 10.0}
_PASSAGE_BYTES = 600  # of about 100 English words


class Folder:
    """Every document below a folder, in the order of their paths; hidden ones are skipped.

    A passage's id is `path#number` (the path below the folder, numbers from 1), its source that
    path. So ids stay as they are when other documents come and go.
    """

    kind = "documents"

    def __init__(self, path: Path, words: int | None = None) -> None:
        self.path = path
        self._words = words

    def read(self, note: Note) -> Iterator[Sourced]:
        """Yield the passages document by document.

        What cannot be read is left out and noted; `DataError` where nothing is left.
        """
        documents = read = 0
        reason = ""
        for path, name in self._files(note):
            documents += 1
            count = 0
            try:
                document = read_document(path, note, name)
                title = document.title or Path(name).stem
                for text in cut(document.blocks, self._words):
                    count += 1
                    yield Sourced(Passage(f"{name}#{count}", title, text, name), str(path))
            except UnreadableError as error:
                reason = f"{name}: left out: {error}"
                note(reason)
                continue
            except OSError as error:
                reason = f"{name}: left out: cannot read: {error.strerror or error}"
                note(reason)
                continue
            if count:
                read += 1
            else:
                reason = f"{name}: left out: empty"
                note(reason)
        if not read:
            what = f"no text in its {documents} documents" if documents else "no documents in it"
            known = ", ".join(sorted(SUFFIXES))
            last = f"; the last: {reason}" if reason else ""
            raise DataError(f"{self.path}: {what} (known: {known}){last}")

    def estimate(self) -> Estimate:
        """Guess from the sizes of the files."""
        text = 0.0
        for path, _ in self._files(lambda _: None):
            text += path.stat().st_size / _BYTES_PER_TEXT_BYTE.get(path.suffix.lower(), 1.0)
        return Estimate(-(-int(text) // _PASSAGE_BYTES), int(text))

    def _files(self, note: Note) -> Iterator[tuple[Path, str]]:
        """Yield the documents and their names: paths below the folder, with `/` between parts."""
        if self.path.is_file():
            yield self.path, self.path.name
            return
        unread = Counter[str]()

        def missed(error: OSError) -> None:
            note(f"{error.filename}: left out: {error.strerror}")

        for folder, below, files in os.walk(self.path, onerror=missed):
            below[:] = sorted(name for name in below if not name.startswith("."))
            for name in below:
                if (path := Path(folder) / name).is_symlink():
                    link = path.relative_to(self.path).as_posix()
                    note(f"{link!a}: left out: a link to a folder; index it by itself")
            for name in sorted(files):
                path = Path(folder) / name
                if name.startswith(".") or not path.is_file():
                    continue
                if path.suffix.lower() not in SUFFIXES:
                    unread[path.suffix.lower() or "no suffix"] += 1
                    continue
                below_root = path.relative_to(self.path).as_posix()
                try:
                    below_root.encode("utf-8")
                except UnicodeEncodeError:
                    note(f"{below_root!a}: left out: its name is not valid UTF-8; rename it")
                    continue
                yield path, below_root
        if unread:
            kinds = ", ".join(f"{n} {kind}" for kind, n in unread.most_common(5))
            note(f"left out, files of other kinds: {kinds}")
