"""Hybrid retrieval: what several retrievers found, fused into one ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from shoulders.reader.passage import Found, Retriever

K0 = 60.0  # of the formula; the value of Cormack et al. 2009


class HybridRetriever:
    """Fuses two or more retrievers over the same passages.

    `reciprocal`: the sum of `weight / (60 + rank)` over the retrievers that found a passage, ranks
    from 1 (Cormack, Clarke and Buettcher 2009, "Reciprocal rank fusion outperforms Condorcet and
    individual rank learning methods"). Scales of scores do not matter.

    `weighted`: the sum of `weight * s`, where `s` is the retriever's score moved to 0..1 between
    the lowest and the highest that it found for this question; 0 where it did not find the
    passage, 1 where all it found have the same score.
    """

    def __init__(
        self,
        retrievers: Sequence[Retriever],
        *,
        fusion: Literal["reciprocal", "weighted"] = "reciprocal",
        weights: Sequence[float] | None = None,
        depth: int = 100,
    ) -> None:
        """Fuse `retrievers`.

        Args:
            retrievers: two or more.
            fusion: how, see the class.
            weights: one for each retriever, not negative and not all 0; by default equal, 1.
            depth: how many passages each retriever is asked for at least (`k` where that is more).
        """
        self._weights = list(weights) if weights is not None else [1.0] * len(retrievers)
        if len(retrievers) < 2 or len(self._weights) != len(retrievers):
            raise ValueError("fusion needs two or more retrievers, and one weight for each")
        if min(self._weights) < 0 or not any(self._weights):
            raise ValueError("weights must not be negative, and not all 0")
        if fusion not in ("reciprocal", "weighted"):
            raise ValueError(f"fusion {fusion!r}: use reciprocal or weighted")
        self._retrievers = list(retrievers)
        self._fusion = fusion
        self._depth = depth

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return at most `k` passages for each question, of those that any retriever found.

        Equal scores are ordered by the first retriever's ranks, then the second's, and so on.
        """
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        found = [r.search(questions, max(k, self._depth)) for r in self._retrievers]
        fused = [
            self._fuse([(f.ids[q], f.scores[q]) for f in found], k) for q in range(len(questions))
        ]
        return Found([[i for i, _ in row] for row in fused], [[s for _, s in row] for row in fused])

    def _fuse(
        self, found: Sequence[tuple[list[str], list[float]]], k: int
    ) -> list[tuple[str, float]]:
        total: dict[str, float] = {}  # in the order of the ranks: sorting below is stable
        for weight, (ids, scores) in zip(self._weights, found, strict=True):
            shares = _reciprocal(ids) if self._fusion == "reciprocal" else _scaled(scores)
            for passage, share in zip(ids, shares, strict=True):
                total[passage] = total.get(passage, 0.0) + weight * share
        return sorted(total.items(), key=lambda item: -item[1])[:k]


def _reciprocal(ids: Sequence[str]) -> list[float]:
    return [1 / (K0 + rank) for rank in range(1, len(ids) + 1)]


def _scaled(scores: Sequence[float]) -> list[float]:
    if not scores:
        return []
    low, high = min(scores), max(scores)
    return [(s - low) / (high - low) if high > low else 1.0 for s in scores]
