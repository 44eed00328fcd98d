"""Cutting documents into passages of about a hundred words, at the ends of sentences.

Karpukhin et al. 2020 (arXiv 2004.04906) cut Wikipedia into blocks of exactly 100 words, often in
the middle of a sentence. Here a passage ends where a sentence or paragraph does, and a document's
words are all kept, in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

WORDS = 100  # of a passage, as in DPR
MAX_WORD = 400  # characters; a longer run without a space is no word (Chinese text, base64)
_CHARACTERS = 20  # a passage has at most this many characters for each word of its size
_SMALL = 0.25  # a last passage below this share of the size joins the one before it
_HEADING_FROM = 0.5  # a heading begins a new passage where the one before has this share
_SENTENCE_END = re.compile(r"""[.!?…]["'”’)\]]*(\s+)(?=["'“‘(\[]*[^\W_a-z])""")
_CUT_IN_RUN = re.compile(rf"[^。！？；，、]{{1,{MAX_WORD - 1}}}[。！？；，、]?|[。！？；，、]")


class Block(NamedTuple):
    """A paragraph or a heading, as a document's reader yields it."""

    text: str
    heading: bool = False


class _Piece(NamedTuple):
    words: list[str]
    characters: int  # with the spaces between
    heading: bool


def cut(blocks: Iterable[Block], words: int | None = None) -> Iterator[str]:
    """Yield passages of about `words` words: whole sentences while they fit.

    A sentence that is longer than a passage is cut between words. A word is never cut, unless it
    has more than `MAX_WORD` characters. White space is normalised to single spaces. Takes time
    and memory in proportion to the longest block, not to the document.
    """
    size = words or WORDS
    held: list[str] | None = None  # the newest passage waits: a small last one joins it
    for passage in _packed(_pieces(blocks, size), size):
        if held is not None:
            if len(passage) < _SMALL * size and _fits(held, passage, size):
                held = held + passage  # only the last passage or one before a heading is small
                continue
            yield " ".join(held)
        held = passage
    if held is not None:
        yield " ".join(held)


def _fits(held: list[str], passage: list[str], size: int) -> bool:
    characters = sum(map(len, held)) + sum(map(len, passage))
    return len(held) + len(passage) <= size * (1 + _SMALL) and characters <= size * _CHARACTERS


def _packed(pieces: Iterable[_Piece], size: int) -> Iterator[list[str]]:
    passage: list[_Piece] = []
    count = characters = 0
    for piece in pieces:
        words, length, heading = piece
        full = count + len(words) > size or characters + length > size * _CHARACTERS
        if passage and (full or (heading and count >= _HEADING_FROM * size)):
            # A heading belongs to what follows it.
            kept = len(passage)
            while kept > 1 and passage[kept - 1].heading:
                kept -= 1
            moved = sum(len(p.words) for p in passage[kept:]) + len(words)
            if passage[kept - 1].heading or moved > size:
                kept = len(passage)
            yield [word for p in passage[:kept] for word in p.words]
            passage = passage[kept:]
            count = sum(len(p.words) for p in passage)
            characters = sum(p.characters for p in passage)
        passage.append(piece)
        count += len(words)
        characters += length
    if passage:
        yield [word for p in passage for word in p.words]


def _pieces(blocks: Iterable[Block], size: int) -> Iterator[_Piece]:
    """Yield sentences; long ones in equal parts that fit into a passage."""
    for block in blocks:
        for sentence in [block.text] if block.heading else _sentences(block.text):
            words = sentence.split()
            if not words:
                continue
            if len(sentence) <= min(MAX_WORD, 2 * size):
                yield _Piece(words, len(sentence) + 1, block.heading)
                continue
            if max(map(len, words)) > MAX_WORD:
                words = [part for word in words for part in _shorter(word)]
            characters = sum(map(len, words)) + len(words)
            parts = max(-(-len(words) // size), -(-characters // (size * _CHARACTERS)))
            step = -(-len(words) // parts)
            for start in range(0, len(words), step):
                part = words[start : start + step]
                yield _Piece(part, sum(map(len, part)) + len(part), block.heading)


def _shorter(word: str) -> list[str]:
    return _CUT_IN_RUN.findall(word) if len(word) > MAX_WORD else [word]


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(text):
        yield text[start : end.start(1)]
        start = end.end(1)
    yield text[start:]
