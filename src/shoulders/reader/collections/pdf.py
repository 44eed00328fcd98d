"""The text of a PDF: one block for each page; scanned pages have none."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from shoulders.reader.collections.cut import Block
from shoulders.reader.collections.documents import UnreadableError
from shoulders.reader.collections.source import Note
from shoulders.reader.libraries import needed

# A word divided at the end of a line; before a capital or digit the hyphen is likely its own.
_DIVIDED = re.compile(r"(?<=[^\W\d_])[-\u00ad]\n(?=[^\W\d_A-Z])")


def parse(path: Path, note: Note, name: str) -> tuple[str, Iterator[Block]]:
    """Return the title of the PDF's own description (often empty) and its pages.

    Raises `UnreadableError` where it is damaged, locked by a password, or has no text at all.
    """
    pypdf = needed("pypdf")
    # It logs every oddity of a file; what matters to a user is raised or noted here.
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UnreadableError("locked by a password")
        count = len(reader.pages)
        title = str((reader.metadata and reader.metadata.title) or "")
    except UnreadableError:
        raise
    except Exception as error:  # a damaged PDF may raise anything
        raise UnreadableError(f"not a readable PDF ({_first_line(error)})") from error
    return " ".join(title.split()), _pages(reader, count, note, name)


def _pages(reader: object, count: int, note: Note, name: str) -> Iterator[Block]:
    empty = 0
    for number in range(count):
        try:
            text = reader.pages[number].extract_text()  # type: ignore[attr-defined]
        except Exception as error:
            note(f"{name}: page {number + 1} left out ({_first_line(error)})")
            text = ""
        if text.strip():
            yield Block(_DIVIDED.sub("", text.encode("utf-8", "replace").decode()))
        else:
            empty += 1
    if empty == count:
        raise UnreadableError("a PDF without text (scanned pages?); run OCR on it first")
    if empty:
        note(f"{name}: {empty} of {count} pages have no text")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
