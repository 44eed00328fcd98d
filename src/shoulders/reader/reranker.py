"""`Reranker`: scores the passages that a retriever has found, so that better ones come first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from shoulders.errors import ShouldersError
from shoulders.reader.passage import Collection, Found, Passage

Scores = list[list[float]]  # of `q` questions, one score for each of a question's passages
OnPairs = Callable[[int], None]  # told how many (question, passage) pairs were just scored


class Reranker(Protocol):
    """Scores passages by question. Higher is better; the scale is the re-ranker's own."""

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return one score for each passage, in the order given.

        Args:
            questions: `q` questions.
            passages: each question's passages; a question may have none.
            retrieved: the retriever's scores, as many.
            on_pairs: called with the number of pairs after each batch, for a progress bar.
        """
        ...


class RetrieverScores:
    """What the retriever said, as a re-ranker: a baseline, and a part of fusions."""

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return the retriever's scores."""
        check_shapes(questions, passages, retrieved)
        if on_pairs is not None:
            on_pairs(sum(len(row) for row in passages))
        return [[float(score) for score in row] for row in retrieved]


def found_passages(found: Found, collection: Collection) -> list[list[Passage]]:
    """Return the passages of each row of `found`, each fetched once."""
    ids = list(dict.fromkeys(i for row in found.ids for i in row))
    by_id = dict(zip(ids, collection.passages(ids), strict=True))
    return [[by_id[i] for i in row] for row in found.ids]


def reranked(
    found: Found,
    reranker: Reranker,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    *,
    on_pairs: OnPairs | None = None,
) -> Found:
    """Return `found`, best first by the re-ranker and with its scores.

    Args:
        found: of `q` questions.
        reranker: what scores.
        questions: `q` of them.
        passages: those of `found`, in its order (`found_passages`).
        on_pairs: as in `Reranker.score`.

    Raises:
        ShouldersError: a score is not a number.
    """
    scores = reranker.score(questions, passages, found.scores, on_pairs=on_pairs)
    return reordered(found, scores)


def reordered(found: Found, scores: Sequence[Sequence[float]]) -> Found:
    """Return `found` in descending order of `scores`; equal scores keep the retriever's order.

    Raises `ShouldersError` for a score that is not a number, which has no place in an order.
    """
    ids: list[list[str]] = []
    kept: Scores = []
    for row, (names, own) in enumerate(zip(found.ids, scores, strict=True)):
        if len(names) != len(own):
            raise ValueError(f"question {row + 1}: {len(own)} scores for {len(names)} passages")
        if any(math.isnan(score) for score in own):
            raise ShouldersError(f"question {row + 1}: the re-ranker's scores are not numbers")
        order = sorted(range(len(own)), key=lambda i: -own[i])
        ids.append([names[i] for i in order])
        kept.append([float(own[i]) for i in order])
    return Found(ids, kept)


def check_shapes(
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    retrieved: Sequence[Sequence[float]],
) -> None:
    """Raise `ValueError` unless every question has its passages and every passage its score."""
    if not len(questions) == len(passages) == len(retrieved):
        raise ValueError(
            f"{len(questions)} questions, {len(passages)} rows of passages, "
            f"{len(retrieved)} rows of retrieved scores"
        )
    for row, (own, scores) in enumerate(zip(passages, retrieved, strict=True)):
        if len(own) != len(scores):
            raise ValueError(f"question {row + 1}: {len(scores)} scores for {len(own)} passages")


def headed(passage: Passage) -> str:
    """Return a passage's text under its title, as re-rankers read it."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def length_sorted(lengths: Sequence[int], most_tokens: int, most_rows: int) -> list[list[int]]:
    """Split indices into batches of similar length, longest first (memory shows at once).

    A batch takes rows while rows * its longest row <= `most_tokens`, one at least.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rows = len(batches[-1]) + 1 if batches else 0
        # Descending order: a batch's first row is its longest.
        if batches and rows <= most_rows and rows * lengths[batches[-1][0]] <= most_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
