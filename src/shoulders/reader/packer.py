"""The packer: fill the LM's window with passages, best first, and never lose the question.

Greedy in descending score (arXiv 2204.10019, section on frozen readers): whole passages while they
fit, then as many sentences of the next one as fit, then no more. Where not even the best one's
first sentence fits (a table has no sentences), as many of its lines, words or letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shoulders.errors import WindowError
from shoulders.reader.passage import Passage

# A sentence ends at . ! ? (and closing quotes) before white space; an initial or a number does not.
# Chinese and Japanese have ends of their own, and no white space.
_SENTENCE_END = re.compile(r"(?<=[^\s.][^\s.][.!?])[\"')\]]*\s+|[。！？]+[」』”’）]*\s*")
SEPARATOR = "\n\n"

Count = Callable[[str], int]
"""Number of tokens of a text."""


class PackConfig(BaseModel):
    """How passages stand before the question.

    Attributes:
        tokens: most tokens of passages; None: what the LM's window leaves.
        passages: most passages.
        order: `best_first`, or `best_last`: the best one next to the question.
        titles: whether a passage begins with its document's title.
        question: what stands before the question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int | None = Field(default=320, ge=1)
    passages: int = Field(default=100, ge=1)
    order: Literal["best_first", "best_last"] = "best_first"
    titles: bool = True
    question: str = "Question: "


@dataclass(frozen=True, slots=True)
class Packed:
    """What the LM will read, and what it will not.

    Attributes:
        text: passages and question.
        context: the passages alone, as they stand in `text`.
        used: the passages, best first, the last one perhaps cut: its text is what was left of it.
        cut: whether the last one was.
        left_out: ids of those that found no room, best first.
        tokens: of `context`.
    """

    text: str
    context: str
    used: tuple[Passage, ...]
    cut: bool
    left_out: tuple[str, ...]
    tokens: int


def pack(
    question: str,
    passages: Sequence[Passage],
    config: PackConfig,
    count: Count,
    room: int,
) -> Packed:
    """Pack passages, given best first, before a question.

    Args:
        question: stands last, always whole.
        passages: in descending score.
        config: how many tokens at most, and in which order.
        count: the LM's tokens of a text.
        room: tokens for passages and question together: what the LM's window leaves beside prompt,
            separator and answer.

    Raises:
        WindowError: the question alone does not fit.
    """
    asked = config.question + question
    if count(asked) > room:
        raise WindowError(
            f"question '{question[:40]}...': {count(asked)} tokens, {max(room, 0)} fit; shorten it",
            text=question,
        )

    def fits(chosen: Sequence[Passage]) -> bool:
        context = _joined(chosen, config)
        within = config.tokens is None or count(context) <= config.tokens
        return within and count(context + asked) <= room

    used: list[Passage] = []
    cut = False
    for passage in passages[: config.passages]:
        if fits([*used, passage]):
            used.append(passage)
            continue
        ways = (sentences,) if used else (sentences, _lines, _words, list)
        starts = (_cut(passage, way(passage.text), lambda p: fits([*used, p])) for way in ways)
        shorter = next((start for start in starts if start is not None), None)
        if shorter is not None:
            used.append(shorter)
            cut = True
        break
    context = _joined(used, config)
    return Packed(
        text=context + asked,
        context=context,
        used=tuple(used),
        cut=cut,
        left_out=tuple(p.id for p in passages[len(used) :]),
        tokens=count(context) if used else 0,
    )


def sentences(text: str) -> list[str]:
    """Split a text after its sentences; joined they are the text again."""
    pieces, start = [], 0
    for match in _SENTENCE_END.finditer(text):
        pieces.append(text[start : match.end()])
        start = match.end()
    return [*pieces, text[start:]] if start < len(text) else pieces


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _words(text: str) -> list[str]:
    return re.findall(r"\s*\S+\s*", text)


def shown(passage: Passage, config: PackConfig) -> str:
    """Return a passage as it stands in the context."""
    return f"{passage.title}\n{passage.text}" if config.titles and passage.title else passage.text


def _joined(passages: Sequence[Passage], config: PackConfig) -> str:
    """Return the context of passages given best first, with what separates it from the question."""
    ordered = passages if config.order == "best_first" else list(reversed(passages))
    return "".join(shown(p, config) + SEPARATOR for p in ordered)


def _cut(
    passage: Passage, pieces: Sequence[str], fits: Callable[[Passage], bool]
) -> Passage | None:
    """Return as many pieces of a passage as fit, or None if not even the first does."""

    def start(n: int) -> Passage:
        text = "".join(pieces[:n]).rstrip()
        return Passage(passage.id, passage.title, text, passage.source)

    low, high = 0, len(pieces) - 1  # so many fit, and at most so many might
    while low < high:
        middle = (low + high + 1) // 2
        if fits(start(middle)):
            low = middle
        else:
            high = middle - 1
    return start(low) if low else None
