"""Sparse retrieval: BM25 over title and text, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.reader.index.ids import Ids
from shoulders.reader.index.store import PassageStore, analyzer, composed
from shoulders.reader.passage import Found

MAX_TERMS = 1024  # of a question; what stands behind is not looked for


class SparseRetriever:
    """BM25 (Robertson and Zaragoza 2009, as Lucene has it) with English stems.

    A question is only words: quotes, brackets, AND and the like mean nothing, and one without any
    letter or digit finds nothing.
    """

    def __init__(self, store: PassageStore, ids: Ids) -> None:
        self._store = store
        self._ids = ids

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return at most `k` passages for each question (fewer where fewer share a word)."""
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        analyze = analyzer().analyze
        ids, scores = [], []
        for question in questions:
            words = analyze(composed(question))[:MAX_TERMS]
            hits = self._store.search(words, k) if words else []
            ids.append(self._ids.take([number for _, number in hits]))
            scores.append([score for score, _ in hits])
        return Found(ids, scores)
