"""Reading one document: a title and its paragraphs, from .txt, .md, .html and .pdf files."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from shoulders.reader.collections.cut import Block
from shoulders.reader.collections.source import Note

_BLOCK = 65_536  # characters; a longer paragraph is handed on in parts, so that memory stays small
_READ = 1 << 20  # bytes read at once
_MAX_WHOLE = 256_000_000  # bytes; HTML and PDF are parsed whole
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_PARAGRAPH = re.compile(r"\n[ \t\f\v\r]*\n\s*")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t#]*$", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\[\]\n]*)\]\([^()\s]*(?:[ \t]+\"[^\"\n]*\")?\)")


class Document(NamedTuple):
    """A document as it is read: its title (empty where it names none) and its blocks, once."""

    title: str
    blocks: Iterator[Block]


class UnreadableError(Exception):
    """A document cannot be read; the reason is one clause, without the path."""


def read_document(path: Path, note: Note, name: str) -> Document:
    """Open a document; its blocks are read as they are iterated.

    Args:
        path: a file with one of `SUFFIXES`.
        note: is told what was replaced or left out.
        name: what messages call the file.

    Raises:
        UnreadableError: here or while blocks are read, where nothing can be made of the file.
    """
    return SUFFIXES[path.suffix.lower()](path, note, name)


def _plain(path: Path, note: Note, name: str) -> Document:
    return Document("", (Block(text) for text in _paragraphs(_decoded(path, note, name))))


def _markdown(path: Path, note: Note, name: str) -> Document:
    """Headings are blocks of their own, links are their texts; the rest is left as it is."""
    title = ""
    # The title is the first heading, wherever it stands: a first look at the first megabyte.
    for block in _markdown_blocks(next(_decoded(path, lambda _: None, name), "")):
        if block.heading:
            title = block.text
            break
    parts = _paragraphs(_decoded(path, note, name))
    return Document(title, (block for part in parts for block in _markdown_blocks(part)))


def _markdown_blocks(text: str) -> Iterator[Block]:
    text = _LINK.sub(r"\1", text)
    start = 0
    for heading in _HEADING.finditer(text):
        if text[start : heading.start()].strip():
            yield Block(text[start : heading.start()])
        if heading[1].strip():
            yield Block(heading[1].strip(), heading=True)
        start = heading.end()
    if text[start:].strip():
        yield Block(text[start:])


def _html(path: Path, note: Note, name: str) -> Document:
    from shoulders.reader.collections.html import parse

    return Document(*parse(_whole(path), note, name))


def _pdf(path: Path, note: Note, name: str) -> Document:
    from shoulders.reader.collections.pdf import parse

    _check_size(path)
    return Document(*parse(path, note, name))


SUFFIXES: dict[str, Callable[[Path, Note, str], Document]] = {
    ".txt": _plain,
    ".text": _plain,
    ".rst": _plain,
    ".md": _markdown,
    ".markdown": _markdown,
    ".html": _html,
    ".htm": _html,
    ".xhtml": _html,
    ".pdf": _pdf,
}


def _check_size(path: Path) -> None:
    if path.stat().st_size > _MAX_WHOLE:
        raise UnreadableError(f"larger than {_MAX_WHOLE:,} bytes; divide it")


def _whole(path: Path) -> bytes:
    _check_size(path)
    return path.read_bytes()


def _decoded(path: Path, note: Note, name: str) -> Iterator[str]:
    """Yield the text of a file in parts of about a megabyte, invalid bytes replaced."""
    with path.open("rb") as file:
        raw = file.read(_READ)
        encoding = "utf-16" if raw.startswith(_UTF16) else "utf-8"
        if encoding == "utf-8" and b"\0" in raw[:8192]:
            raise UnreadableError("not a text file (zero bytes)")
        raw = raw.removeprefix(codecs.BOM_UTF8)
        strict = codecs.getincrementaldecoder(encoding)("strict")
        lenient = codecs.getincrementaldecoder(encoding)("replace")
        offset, told = 0, False
        while True:
            final = not raw
            if not told:
                try:
                    strict.decode(raw, final)
                except UnicodeDecodeError as error:
                    told = True
                    note(
                        f"{name}: not valid {encoding.upper()} near byte "
                        f"{offset + error.start + 1}; what cannot be read became '\ufffd'"
                    )
            yield lenient.decode(raw, final).replace("\r\n", "\n").replace("\r", "\n")
            if final:
                return
            offset += len(raw)
            raw = file.read(_READ)


def _paragraphs(parts: Iterator[str]) -> Iterator[str]:
    """Yield paragraphs (between blank lines); a very long one in parts that end between words."""
    rest = ""
    for part in parts:
        *whole, rest = _PARAGRAPH.split(rest + part)
        for paragraph in whole:
            yield from _limited(paragraph)
        if len(rest) > _BLOCK:
            *whole, rest = _limited(rest)
            yield from whole
    yield rest


def _limited(paragraph: str) -> Iterator[str]:
    start = 0
    while len(paragraph) - start > _BLOCK:
        end = start + _BLOCK
        space = max(paragraph.rfind(" ", start, end), paragraph.rfind("\n", start, end))
        end = space if space > start else end  # one run of characters: no words to keep whole
        yield paragraph[start:end]
        start = end
    yield paragraph[start:]
