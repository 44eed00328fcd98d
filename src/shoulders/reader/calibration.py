"""From scores to probabilities that can be believed, and how far they can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat

from shoulders.errors import ShouldersError, TrainingError, install

Values = NDArray[np.float64]


class Platt(BaseModel):
    """`1 / (1 + exp(-(slope * score + bias)))`: a score as a probability."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slope: FiniteFloat
    bias: FiniteFloat

    def probability(self, score: float) -> float:
        """Return the probability that a passage with this score holds the answer."""
        return float(sigmoid(np.float64(self.slope * score + self.bias)))


def fit_platt(scores: Sequence[float], labels: Sequence[bool]) -> Platt:
    """Fit Platt's scaling to scores of passages that the scorer was not trained on.

    Maximum likelihood by Newton's method, with the targets (n+ + 1) / (n+ + 2) and 1 / (n- + 2) in
    place of 1 and 0 (Platt 1999; the steps are Lin, Lin and Weng's, 2007): with few examples it
    does not become too sure.

    Raises:
        TrainingError: not both labels occur, a score is not finite, or higher scores are not more
            often right, so that probabilities would turn the order around.
    """
    x, right = _checked(scores, labels)
    positives, negatives = int(right.sum()), int((~right).sum())
    if not positives or not negatives:
        raise TrainingError(
            f"calibration needs passages with and without the answer: there are {positives} and "
            f"{negatives}"
        )
    middle, scale = float(x.mean()), float(x.std())
    if scale == 0:
        raise TrainingError("calibration: all scores are the same")
    # Newton's method on standardised scores: whatever their size, the first step is a good one.
    features = np.stack([(x - middle) / scale, np.ones_like(x)], 1)
    targets = np.where(right, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weights = _newton(features, targets)
    slope = float(weights[0]) / scale
    if slope <= 0:
        raise TrainingError(
            "calibration: passages with higher scores do not hold the answer more often; the "
            "scores are of no use"
        )
    return Platt(slope=slope, bias=float(weights[1]) - slope * middle)


class Bin(BaseModel):
    """Predictions from `low` to `high`: how many, their mean, and how many of them were right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    count: int
    predicted: float
    observed: float


class Reliability(BaseModel):
    """How often what was said to be likely was so.

    Attributes:
        bins: of equal width, empty ones left out.
        ece: expected calibration error, from 0 to 1.
        brier: mean squared error of the probabilities, from 0 to 1.
        count: number of predictions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bins: tuple[Bin, ...]
    ece: float
    brier: float
    count: int


def reliability(
    probabilities: Sequence[float], labels: Sequence[bool], bins: int = 10
) -> Reliability:
    """Sort predictions into bins and compare what was predicted with what was observed.

    The expected calibration error is the mean over predictions of the distance between both in a
    prediction's bin (Naeini et al. 2015; Guo et al. 2017, arXiv 1706.04599). Raises `ValueError`
    for probabilities outside 0 to 1, none at all, or fewer bins than one.
    """
    p, right = _checked(probabilities, labels)
    if bins < 1 or not len(p) or p.min() < 0 or p.max() > 1:
        raise ValueError(f"{bins} bins of {len(p)} probabilities, which must be from 0 to 1")
    which = np.minimum((p * bins).astype(int), bins - 1)  # 1.0 belongs to the last bin
    found = []
    for index in range(bins):
        inside = which == index
        if inside.any():
            found.append(
                Bin(
                    low=index / bins,
                    high=(index + 1) / bins,
                    count=int(inside.sum()),
                    predicted=float(p[inside].mean()),
                    observed=float(right[inside].mean()),
                )
            )
    ece = sum(b.count * abs(b.predicted - b.observed) for b in found) / len(p)
    brier = float(np.square(p - right).mean())
    return Reliability(bins=tuple(found), ece=ece, brier=brier, count=len(p))


def plot_reliability(curves: Mapping[str, Reliability], path: Path) -> None:
    """Draw reliability curves (above) and how many predictions each bin has (below).

    Raises `ShouldersError` without matplotlib, or where the plot cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ShouldersError(f"plots need matplotlib; {install('train')}") from None
    figure: Any = Figure(figsize=(5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    for name, curve in curves.items():
        predicted = [b.predicted for b in curve.bins]
        label = f"{name} (ECE {100 * curve.ece:.1f}%)"
        above.plot(predicted, [b.observed for b in curve.bins], marker="o", label=label)
        below.plot(predicted, [b.count for b in curve.bins], marker="o")
    above.set(ylabel="share that holds the answer", xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left", fontsize="small")
    below.set(xlabel="predicted probability", ylabel="passages", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ShouldersError(f"{path}: cannot write: {error}") from error


def sigmoid(x: Any) -> Any:
    """Return the logistic function of an array or number, without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def _newton(features: Values, targets: Values, most: int = 100) -> Values:
    """Return the weights `[f]` of a logistic regression without penalty on `[n, f]` features."""

    def loss(weights: Values) -> float:
        z = features @ weights
        return float((np.logaddexp(0, z) - targets * z).sum())

    weights = np.zeros(features.shape[1])
    value = loss(weights)
    for _ in range(most):
        p = sigmoid(features @ weights)
        gradient = features.T @ (p - targets)
        if np.abs(gradient).max() < 1e-9 * len(targets):
            break
        # Where everything is certain the curvature vanishes; a trace of ridge keeps it solvable.
        curvature = (features * (p * (1 - p))[:, None]).T @ features
        step = np.linalg.solve(curvature + 1e-12 * np.eye(len(weights)), gradient)
        size = 1.0
        while size > 1e-8 and loss(weights - size * step) > value:
            size /= 2
        weights = weights - size * step
        value = loss(weights)
    return weights


def _checked(scores: Sequence[float], labels: Sequence[bool]) -> tuple[Values, NDArray[np.bool_]]:
    x, right = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if x.ndim != 1 or x.shape != right.shape:
        raise ValueError(f"{x.shape} scores and {right.shape} labels, one row of each is needed")
    if not np.isfinite(x).all():
        raise TrainingError("calibration: a score is not a finite number")
    return x, right
