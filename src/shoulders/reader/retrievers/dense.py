"""Dense retrieval, exact: the inner products of a question's vector with all passages'."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from shoulders.reader.index.ids import Ids
from shoulders.reader.passage import Found
from shoulders.reader.retrievers.best import Best

Embed = Callable[[Sequence[str]], np.ndarray]  # questions -> vectors [q, e] float32

_BLOCK = 4096  # vectors that are widened to float32 and compared at once: they stay in the cache
_QUESTIONS = 256  # that are searched for together


class DenseRetriever:
    """Inner products with a memory-mapped matrix, in blocks; memory does not grow with it."""

    def __init__(
        self, vectors: np.ndarray, embed: Embed, ids: Ids, deleted: Sequence[int] = ()
    ) -> None:
        """Search `vectors` `[rows, e]`, whose row `n` belongs to the passage with number `n`."""
        self._vectors = vectors
        self._embed = embed
        self._ids = ids
        self._deleted = np.asarray(sorted(deleted), dtype=np.int64)

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return the `k` passages nearest to each question; fewer where there are fewer."""
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        ids, scores = [], []
        for start in range(0, len(questions), _QUESTIONS):
            wanted = self._embed(questions[start : start + _QUESTIONS])
            for numbers, found in self.nearest(wanted, k):
                ids.append(self._ids.take(numbers.tolist()))
                scores.append(found.tolist())
        return Found(ids, scores)

    def nearest(self, wanted: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return numbers and scores, best first, for each row of `wanted` `[q, e]`."""
        rows, width = self._vectors.shape
        columns = torch.from_numpy(np.ascontiguousarray(wanted, dtype=np.float32)).T
        wide = torch.empty(min(_BLOCK, rows), width)
        best = Best(len(wanted), k)
        for first in range(0, rows, _BLOCK):
            part = torch.from_numpy(self._vectors[first : first + _BLOCK])
            scores = (wide[: len(part)].copy_(part) @ columns).T.numpy()
            low, high = np.searchsorted(self._deleted, [first, first + len(part)])
            scores[:, self._deleted[low:high] - first] = -np.inf
            best.add(scores, first)
        return best.result()
