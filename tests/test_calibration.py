"""Calibration against scikit-learn and by hand; it improves what is miscalibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoulders.errors import TrainingError
from shoulders.reader.calibration import (
    Platt,
    fit_platt,
    plot_reliability,
    reliability,
)


def too_sure(count: int, seed: int) -> tuple[list[float], list[bool]]:
    """Logits three times as large as they should be, and too high."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=count)
    right = random.random(count) < 1 / (1 + np.exp(-logits))
    return (3 * logits + 2).tolist(), right.tolist()


def test_platt_equals_scikit_learns() -> None:
    pytest.importorskip("sklearn")
    from sklearn.calibration import _SigmoidCalibration

    scores, right = too_sure(500, 0)
    platt = fit_platt(scores, right)
    reference = _SigmoidCalibration().fit(np.array(scores), np.array(right))
    assert (platt.slope, platt.bias) == pytest.approx((-reference.a_, -reference.b_), abs=1e-4)


def test_platt_recovers_what_was_done_to_the_scores() -> None:
    scores, right = too_sure(20_000, 1)
    platt = fit_platt(scores, right)
    assert (platt.slope, platt.bias) == pytest.approx((1 / 3, -2 / 3), abs=0.03)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_platt_does_not_mind_the_scale(scale: float) -> None:
    scores, right = too_sure(300, 2)
    one, other = fit_platt(scores, right), fit_platt([scale * s for s in scores], right)
    assert other.slope * scale == pytest.approx(one.slope, rel=1e-6)


def test_platt_is_not_too_sure_of_few_separated_scores() -> None:
    platt = fit_platt([0.0, 1.0, 2.0, 3.0], [False, False, True, True])
    # The targets are 1/4 and 3/4: as likely as after one more of each.
    assert platt.probability(3.0) < 0.9
    assert platt.probability(0.0) > 0.1


def test_calibration_improves_held_out_reliability() -> None:
    platt = fit_platt(*too_sure(2000, 3))
    scores, right = too_sure(2000, 4)
    before = reliability([1 / (1 + np.exp(-s)) for s in scores], right)
    after = reliability([platt.probability(s) for s in scores], right)
    assert before.ece > 0.15
    assert after.ece < 0.04
    assert after.brier < before.brier


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1.0, 2.0], [True, True], "2 and 0"),
        ([], [], "0 and 0"),
        ([1.0, 1.0], [True, False], "all scores are the same"),
        ([1.0, 2.0, 3.0], [True, False, False], "of no use"),
        ([1.0, float("nan")], [True, False], "finite"),
    ],
)
def test_what_cannot_be_calibrated_says_so(scores, labels, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fit_platt(scores, labels)


def test_reliability_by_hand() -> None:
    curve = reliability([0.05, 0.15, 0.95, 1.0, 0.1], [False, True, True, True, False])
    assert [(b.low, b.count, b.predicted, b.observed) for b in curve.bins] == [
        (0.0, 1, 0.05, 0.0),
        (0.1, 2, pytest.approx(0.125), 0.5),
        (0.9, 2, pytest.approx(0.975), 1.0),
    ]
    assert curve.ece == pytest.approx((1 * 0.05 + 2 * 0.375 + 2 * 0.025) / 5)
    assert curve.brier == pytest.approx((0.05**2 + 0.85**2 + 0.05**2 + 0.1**2) / 5)
    assert curve.count == 5


@pytest.mark.parametrize("values", [[], [1.1], [-0.1]])
def test_reliability_needs_probabilities(values: list[float]) -> None:
    with pytest.raises(ValueError):
        reliability(values, [True] * len(values))


@pytest.mark.parametrize(("score", "expected"), [(0.5, 0.5), (-1000.0, 0.0), (1000.0, 1.0)])
def test_scores_of_any_size_are_probabilities(score: float, expected: float) -> None:
    assert Platt(slope=2.0, bias=-1.0).probability(score) == pytest.approx(expected)


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    scores, right = too_sure(200, 5)
    curve = reliability([1 / (1 + np.exp(-s)) for s in scores], right)
    plot_reliability({"a": curve, "b": curve}, tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")
