"""The text of an HTML page: its title, and one block for each paragraph-like element."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shoulders.reader.collections.cut import Block
from shoulders.reader.collections.source import Note
from shoulders.reader.libraries import needed

# Not part of what a page says.
_DROPPED = "script, style, template, noscript, svg, nav, iframe, object, select, button, head"
_INLINE = frozenset(
    re.findall(
        r"\w+",
        "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark "
        "meter output q rp rt ruby s samp small span strike strong sub sup time tt u var wbr",
    )
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_CELLS = frozenset(("td", "th"))
_CHARSET = re.compile(rb"""charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)


def parse(raw: bytes, note: Note, name: str) -> tuple[str, Iterator[Block]]:
    """Return the title (of `<title>`, else the first `<h1>`, else empty) and the blocks."""
    parser = needed("selectolax.lexbor").LexborHTMLParser(_decoded(raw, note, name))
    title = parser.css_first("title") or parser.css_first("h1")
    found = " ".join(title.text().split()) if title is not None else ""
    for node in parser.css(_DROPPED):
        node.decompose()
    return found, _blocks(parser)


def _decoded(raw: bytes, note: Note, name: str) -> str:
    named = _CHARSET.search(raw[:2048])
    for encoding in ("utf-8-sig", named[1].decode("ascii") if named else None):
        try:
            if encoding:
                return raw.decode(encoding)
        except (UnicodeDecodeError, LookupError):
            continue
    note(f"{name}: neither UTF-8 nor as its charset says; what cannot be read became '\ufffd'")
    return raw.decode("utf-8", errors="replace")


def _blocks(parser: object) -> Iterator[Block]:
    """Walk the tree without recursion: pages may be nested deeper than the interpreter's stack."""
    node = parser.body or parser.root  # type: ignore[attr-defined]
    if node is None:
        return
    top, words, heading = node.mem_id, [], False
    while True:
        tag = node.tag
        if tag == "-text":
            words.append(node.text_content or "")
        elif tag in _CELLS or tag == "br":
            words.append(" ")
        elif tag not in _INLINE and tag[:1] != "-":  # `-comment`: many stand inside words
            yield from _one(words, heading)
            words, heading = [], tag in _HEADINGS
        following = node.first_child
        while following is None:
            if node.mem_id == top:
                yield from _one(words, heading)
                return
            if node.tag not in (*_INLINE, *_CELLS, "br") and node.tag[:1] != "-":
                yield from _one(words, heading)
                words, heading = [], False
            following = node.next if node.next is not None else None
            if following is None:
                node = node.parent
        node = following


def _one(parts: list[str], heading: bool) -> Iterator[Block]:
    text = "".join(parts)
    if text.strip():
        yield Block(text, heading)
