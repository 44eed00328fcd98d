"""A frozen sentence encoder as a re-ranker: how near question and passage are. Nothing is trained.

The encoder reads question and passage apart, so that a passage's vector serves all questions; of
sparse retrieval's candidates it needs only those of the passages that were found.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shoulders.encoders.sentence import SentenceEncoder
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import OnPairs, Scores, check_shapes

SLICE = 32  # questions scored together
KEPT = 50_000  # vectors of passages that are remembered: 77 MB of them with 384 dimensions


class SimilarityReranker:
    """Scores a pair by the product of its vectors (the cosine, where they have length 1)."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder
        self._vectors: dict[tuple[str, str], np.ndarray] = {}

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return the similarity of each pair; a passage is encoded once, wherever it stands."""
        check_shapes(questions, passages, retrieved)
        scores: Scores = []
        for start in range(0, len(questions), SLICE):
            asked, own = questions[start : start + SLICE], passages[start : start + SLICE]
            scores += self._slice(asked, own)
            if on_pairs is not None:
                on_pairs(sum(map(len, own)))
        return scores

    def _slice(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> Scores:
        needed = dict.fromkeys((p.title, p.text) for own in passages for p in own)
        new = [key for key in needed if key not in self._vectors]
        if len(self._vectors) + len(new) > KEPT:
            self._vectors = {k: v for k, v in self._vectors.items() if k in needed}
        if new:
            self._vectors |= dict(zip(new, self.encoder.passages(new), strict=True))
        return [
            [float(vector @ self._vectors[p.title, p.text]) for p in own]
            for vector, own in zip(self.encoder.questions(questions), passages, strict=True)
        ]
