"""What readers pass around: a passage, and what a retriever has found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Passage:
    """About a hundred words of one document.

    Attributes:
        id: unique in its collection.
        title: of the document; may be empty.
        text: the words.
        source: where it comes from, for people: a file's path, or empty.
    """

    id: str
    title: str
    text: str
    source: str = ""


class Found(NamedTuple):
    """What a retriever found for `q` questions: each row best first, of at most `k` passages."""

    ids: list[list[str]]
    scores: list[list[float]]


class Retriever(Protocol):
    """Finds passages by questions. Higher scores are better; their scale is the retriever's own."""

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return at most `k` passages for each question (fewer where fewer match)."""
        ...


class Collection(Protocol):
    """Passages by id."""

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        """Return the passages in the order of their ids; `DataError` names an unknown one."""
        ...
