"""Fusion against scikit-learn, by hand, and against its members."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shoulders.errors import ArtefactError, TrainingError
from shoulders.reader.calibration import reliability
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import RetrieverScores
from shoulders.reader.rerankers.fused import (
    Feature,
    FusedReranker,
    Fusion,
    fit_fusion,
    load_fusion,
    save_fusion,
)


def samples(count: int, seed: int, k: int = 5):
    """Two members, each with a noise of its own; the second's scores also shift by question."""
    random = np.random.default_rng(seed)
    truth = random.normal(size=(count, k)) * 2 - 1
    right = random.random((count, k)) < 1 / (1 + np.exp(-truth))
    one = 10 * (truth + random.normal(size=(count, k))) + 50
    shift = 5 * random.normal(size=(count, 1))
    other = truth + random.normal(size=(count, k)) + shift
    return {"one": one.tolist(), "other": other.tolist()}, right.tolist()


def hits_at_1(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> float:
    return float(
        np.mean([own[int(np.argmax(row))] for row, own in zip(scores, right, strict=True)])
    )


def test_by_hand() -> None:
    fusion = Fusion(
        features=(
            Feature(member="a", relative=False, mean=1.0, scale=2.0, weight=0.5),
            Feature(member="a", relative=True, mean=-1.0, scale=1.0, weight=2.0),
            Feature(member="b", relative=False, mean=0.0, scale=1.0, weight=-1.0),
        ),
        bias=0.25,
    )
    rows = fusion.probabilities({"b": [[1.0, 0.0], [], [2.0]], "a": [[3.0, 1.0], [], [5.0]]})
    logits = [
        0.25 + 0.5 * (3 - 1) / 2 + 2 * (0 + 1) - 1,
        0.25 + 0.5 * (1 - 1) / 2 + 2 * (-2 + 1) - 0,
        0.25 + 0.5 * (5 - 1) / 2 + 2 * (0 + 1) - 2,
    ]
    expected = [1 / (1 + math.exp(-z)) for z in logits]
    assert [len(row) for row in rows] == [2, 0, 1]
    assert [*rows[0], *rows[2]] == pytest.approx(expected)


def test_equals_scikit_learn() -> None:
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores, right = samples(80, 0)
    fusion = fit_fusion(scores, right, strength=0.5)
    parts = [np.array(scores[name]) for name in ("one", "other")]
    relative = [part - part.max(1, keepdims=True) for part in parts]
    columns = [parts[0], relative[0], parts[1], relative[1]]
    features = np.stack([column.ravel() for column in columns], 1)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-8, max_iter=9999))
    reference.fit(features, np.ravel(right))
    expected = reference.predict_proba(features)[:, 1]
    assert np.ravel(fusion.probabilities(scores)) == pytest.approx(expected, abs=1e-6)


def test_is_better_than_its_members_and_calibrated() -> None:
    fusion = fit_fusion(*samples(1500, 1))
    scores, right = samples(1500, 2)
    fused = fusion.probabilities(scores)
    assert hits_at_1(fused, right) > max(hits_at_1(scores[m], right) for m in scores) + 0.02
    assert reliability(np.ravel(fused).tolist(), np.ravel(right).tolist()).ece < 0.03


def test_a_member_that_always_says_the_same_has_no_weight() -> None:
    scores, right = samples(50, 3)
    scores["flat"] = [[7.0] * len(row) for row in right]
    assert fit_fusion(scores, right).members == ("one", "other")


def test_comes_back_from_json(tmp_path: Path) -> None:
    scores, right = samples(50, 4)
    fusion = fit_fusion(scores, right)
    save_fusion(fusion, tmp_path / "fusion.json")
    loaded = load_fusion(tmp_path / "fusion.json")
    assert loaded == fusion
    assert loaded.probabilities(scores) == fusion.probabilities(scores)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v | {"format_version": 2},
        lambda v: v | {"features": []},
        lambda v: v | {"bias": "x"},
        lambda v: v | {"more": 1},
        lambda v: v | {"features": [v["features"][0] | {"scale": 0.0}]},
        lambda v: [],
    ],
)
def test_a_spoilt_file_is_refused_by_name(tmp_path: Path, change) -> None:
    save_fusion(fit_fusion(*samples(20, 5)), tmp_path / "fusion.json")
    values = json.loads((tmp_path / "fusion.json").read_text())
    (tmp_path / "fusion.json").write_text(json.dumps(change(values)))
    with pytest.raises(ArtefactError, match=r"fusion\.json: not a fusion"):
        load_fusion(tmp_path / "fusion.json")


def test_what_cannot_be_fitted_says_so() -> None:
    scores, right = samples(20, 6)
    with pytest.raises(TrainingError, match="100 and 0"):
        fit_fusion(scores, [[True] * 5] * 20)
    with pytest.raises(TrainingError, match="differ"):
        fit_fusion({"flat": [[1.0] * 5] * 20}, right)
    scores["one"][3][2] = float("nan")
    with pytest.raises(TrainingError, match="one: a score"):
        fit_fusion(scores, right)
    with pytest.raises(ValueError, match="other: not as many"):
        fit_fusion({"other": scores["other"][:-1]}, right)


class Length:
    """Longer texts are better."""

    def score(
        self, questions, passages: Sequence[Sequence[Passage]], retrieved, *, on_pairs=None
    ) -> list[list[float]]:
        if on_pairs is not None:
            on_pairs(sum(map(len, passages)))
        return [[float(len(p.text)) for p in row] for row in passages]


def test_as_a_reranker() -> None:
    fusion = Fusion(
        features=(
            Feature(member="retriever", relative=False, mean=0, scale=1, weight=1),
            Feature(member="length", relative=False, mean=0, scale=1, weight=2),
        ),
        bias=0,
    )
    members = {"length": Length(), "retriever": RetrieverScores(), "unused": Length()}
    told: list[int] = []
    reranker = FusedReranker(members, fusion)
    passages = [[Passage("a", "", "x"), Passage("b", "", "")], []]
    rows = reranker.score(["q", "r"], passages, [[-1.0, 0.5], []], on_pairs=told.append)
    assert rows[0] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-0.5))])
    assert rows[1] == []
    assert sum(told) == 2
    with pytest.raises(ArtefactError, match="'length'"):
        FusedReranker({"retriever": RetrieverScores()}, fusion)
