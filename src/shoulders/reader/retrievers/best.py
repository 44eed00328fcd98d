"""Keeping the best of many scores that come block by block."""

from __future__ import annotations

import numpy as np


class Best:
    """The `k` best scores of each of `q` questions, of blocks in ascending order of numbers.

    Equal scores are ordered by number, also at the end of the list: a later one does not displace
    an earlier one.
    """

    def __init__(self, questions: int, k: int) -> None:
        self._k = k
        self._scores = [np.zeros(0, np.float32) for _ in range(questions)]
        self._numbers = [np.zeros(0, np.int64) for _ in range(questions)]
        self._least = np.full(questions, -np.inf, np.float32)

    def add(self, scores: np.ndarray, first: int) -> None:
        """Take scores `[q, b]` of the numbers from `first` on; -inf is never kept."""
        for row in np.flatnonzero(scores.max(axis=1, initial=-np.inf) > self._least):
            block = scores[row]
            places = np.flatnonzero(block > self._least[row])
            if len(places) > 4 * self._k:
                # All with the k-th best score stay: which of them count is decided by number.
                kth = np.partition(block[places], len(places) - self._k)[len(places) - self._k]
                places = places[block[places] >= kth]
            joined = np.concatenate([self._scores[row], block[places]])
            numbers = np.concatenate([self._numbers[row], places + first])
            order = np.argsort(-joined, kind="stable")[: self._k]
            self._scores[row], self._numbers[row] = joined[order], numbers[order]
            if len(order) == self._k:
                self._least[row] = self._scores[row][-1]

    def result(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return numbers and scores of each question, best first."""
        return list(zip(self._numbers, self._scores, strict=True))
