"""Similarity by a frozen encoder: plain products of vectors, whatever is remembered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoulders.encoders.sentence import load_sentence_encoder
from shoulders.reader.passage import Passage
from shoulders.reader.rerankers import similarity
from shoulders.reader.rerankers.similarity import SimilarityReranker
from tiny_models import save_tiny_encoder

TEXT = "spain and france "
PASSAGES = [Passage(str(i), "the" if i % 2 else "", TEXT * (i + 1)) for i in range(6)]
QUESTIONS = ["what is the capital?", "two?", "write the number"]
ROWS = [PASSAGES[:4], [], PASSAGES[2:]]


def plain(encoder: similarity.SentenceEncoder) -> list[list[float]]:
    return [
        [float(encoder.questions([q])[0] @ encoder.passages([(p.title, p.text)])[0]) for p in row]
        for q, row in zip(QUESTIONS, ROWS, strict=True)
    ]


@pytest.mark.parametrize("kept", [50_000, 2])
@pytest.mark.parametrize("several", [32, 1])
def test_scores_are_products_of_vectors(
    kept: int, several: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "KEPT", kept)
    monkeypatch.setattr(similarity, "SLICE", several)
    encoder = load_sentence_encoder(str(save_tiny_encoder(tmp_path / "encoder")))
    reranker, told = SimilarityReranker(encoder), list[int]()
    retrieved = [[0.0] * len(row) for row in ROWS]
    for _ in range(2):  # the second time from memory
        scores = reranker.score(QUESTIONS, ROWS, retrieved, on_pairs=told.append)
        for mine, theirs in zip(scores, plain(encoder), strict=True):
            assert np.allclose(mine, theirs, atol=1e-6)
    assert sum(told) == 2 * 8
    assert len(reranker._vectors) <= max(kept, 6 if several > 1 else 4)
    assert reranker.score([], [], []) == []
