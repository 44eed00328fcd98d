"""From questions to ranked passages: retrieve, then re-rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from shoulders.errors import DataError
from shoulders.reader.passage import Collection, Found, Passage, Retriever
from shoulders.reader.questions import Question
from shoulders.reader.reranker import Reranker, found_passages, reordered

SLICE = 64  # questions that are searched and re-ranked together: bounds memory, feeds progress


@dataclass(frozen=True, slots=True)
class Ranked:
    """What was found for one question.

    Attributes:
        retrieved: as the retriever ordered them.
        retrieved_scores: its scores.
        passages: the same ones as the re-ranker ordered them (as retrieved without one).
        scores: its scores.
    """

    retrieved: tuple[Passage, ...]
    retrieved_scores: tuple[float, ...]
    passages: tuple[Passage, ...]
    scores: tuple[float, ...]

    def found_scores(self) -> list[float]:
        """Return the retriever's scores in the order of `passages`."""
        by_passage = dict(zip(self.retrieved, self.retrieved_scores, strict=True))
        return [by_passage[passage] for passage in self.passages]


class Contexts:
    """Finds and orders the passages of questions.

    Args:
        retriever: None where the questions bring their own passages (`Question.contexts`).
        collection: the passages of the ids that the retriever returns.
        reranker: None keeps the retriever's order.
        k: passages to retrieve for each question.
    """

    def __init__(
        self,
        retriever: Retriever | None,
        collection: Collection | None,
        reranker: Reranker | None,
        k: int,
    ) -> None:
        self._retriever, self._collection = retriever, collection
        self._reranker, self._k = reranker, k

    def ranked(
        self, questions: Sequence[Question], on_rows: Callable[[int], None] | None = None
    ) -> list[Ranked]:
        """Return the passages of every question; `on_rows` is told of each finished slice.

        Raises:
            DataError: there is nothing to search, and a question brings no passages.
        """
        results: list[Ranked] = []
        for start in range(0, len(questions), SLICE):
            several = questions[start : start + SLICE]
            results += self._slice(several)
            if on_rows is not None:
                on_rows(len(several))
        return results

    def _slice(self, questions: Sequence[Question]) -> list[Ranked]:
        found, passages = self._retrieved(questions)
        ordered = found
        if self._reranker is not None:
            texts = [question.question for question in questions]
            ordered = reordered(found, self._reranker.score(texts, passages, found.scores))
        return as_ranked(found, ordered, passages)

    def _retrieved(self, questions: Sequence[Question]) -> tuple[Found, list[list[Passage]]]:
        """Return what was found: in the index, or as the questions bring it along."""
        if self._retriever is not None and self._collection is not None:
            found = self._retriever.search([q.question for q in questions], self._k)
            return found, found_passages(found, self._collection)
        passages: list[list[Passage]] = []
        for question in questions:
            # Some collections' passages have no ids: their place tells them apart.
            passages.append(
                [
                    p if p.id else replace(p, id=f"ctxs.{place}")
                    for place, p in enumerate(given(question)[: self._k])
                ]
            )
        return (
            Found(
                # Places again: nothing keeps a file from giving two passages one id.
                [[str(place) for place in range(len(own))] for own in passages],
                [list(q.scores[: self._k]) for q in questions],
            ),
            passages,
        )


def given(question: Question) -> tuple[Passage, ...]:
    """Return the passages that a question brings along; raises `DataError` where it has none."""
    if question.contexts is None:
        raise DataError(
            f"{question.named} brings no passages (ctxs), and there is no index to search: "
            "give --index"
        )
    return question.contexts


def as_ranked(found: Found, ordered: Found, passages: Sequence[Sequence[Passage]]) -> list[Ranked]:
    """Join what was found, the same in a re-ranker's order, and the passages of `found`."""
    ranked = []
    for row, own in enumerate(passages):
        by_id = dict(zip(found.ids[row], own, strict=True))
        ranked.append(
            Ranked(
                tuple(own),
                tuple(found.scores[row]),
                tuple(by_id[i] for i in ordered.ids[row]),
                tuple(ordered.scores[row]),
            )
        )
    return ranked
