"""Fusion: several re-rankers' scores as one calibrated probability.

A logistic regression over standardised features, two of each member: its score, and by how much
the score is below the best one of the same question. The first says how good a passage is; the
second takes out what all passages of a question share (BM25 scores grow with the question's
length, likelihoods fall with its oddity).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError, model_validator

from shoulders.errors import ArtefactError, TrainingError
from shoulders.files import write_json
from shoulders.reader.calibration import sigmoid
from shoulders.reader.libraries import needed
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import OnPairs, Reranker, Scores, check_shapes

Values = NDArray[np.float64]
FORMAT_VERSION = 1


class Feature(BaseModel):
    """One standardised feature: `weight * (value - mean) / scale` is what it adds to the logit.

    Attributes:
        member: whose score it is.
        relative: whether the best score of the question is subtracted from it.
        mean: of the feature where it was fitted.
        scale: its standard deviation there.
        weight: of the standardised feature.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    member: str
    relative: bool
    mean: FiniteFloat
    scale: FiniteFloat
    weight: FiniteFloat


class Fusion(BaseModel):
    """A fitted fusion; JSON as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int = FORMAT_VERSION
    features: tuple[Feature, ...]
    bias: FiniteFloat

    @model_validator(mode="after")
    def _check(self) -> Fusion:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version}, not {FORMAT_VERSION}")
        if not self.features or any(feature.scale <= 0 for feature in self.features):
            raise ValueError("a fusion needs features, each with a scale above 0")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the re-rankers whose scores it needs."""
        return tuple(dict.fromkeys(feature.member for feature in self.features))

    def probabilities(self, scores: Mapping[str, Sequence[Sequence[float]]]) -> Scores:
        """Return each passage's probability to hold the answer from the members' scores."""
        shape = [len(row) for row in scores[self.members[0]]]
        logits = np.full(sum(shape), self.bias)
        for feature in self.features:
            rows = scores[feature.member]
            if [len(row) for row in rows] != shape:
                raise ValueError(f"{feature.member}: not as many scores as {self.members[0]}")
            values = _values(rows, relative=feature.relative)
            logits += feature.weight * (values - feature.mean) / feature.scale
        rest = iter(sigmoid(logits).tolist())
        return [[next(rest) for _ in range(count)] for count in shape]


def fit_fusion(
    scores: Mapping[str, Sequence[Sequence[float]]],
    labels: Sequence[Sequence[bool]],
    *,
    strength: float = 1.0,
) -> Fusion:
    """Fit a fusion to the scores of passages that no member was trained on (`cross_fitted`).

    Args:
        scores: of each member, for `q` questions.
        labels: whether a passage holds the answer.
        strength: of scikit-learn's L2 penalty, inverse (its `C`).

    Raises:
        TrainingError: not both labels occur, a score is not finite, or no member says anything.
        ShouldersError: scikit-learn is not installed.
    """
    right = np.array([label for row in labels for label in row], dtype=bool)
    if not right.any() or right.all():
        raise TrainingError(
            f"a fusion needs passages with and without the answer: there are {int(right.sum())} "
            f"and {int((~right).sum())}"
        )
    columns: list[tuple[str, bool, Values]] = []
    for member, rows in scores.items():
        if [len(row) for row in rows] != [len(row) for row in labels]:
            raise ValueError(f"{member}: not as many scores as labels")
        for relative in (False, True):
            values = _values(rows, relative=relative)
            if not np.isfinite(values).all():
                raise TrainingError(f"{member}: a score is not a finite number")
            if values.std() > 0:  # what is the same everywhere says nothing
                columns.append((member, relative, values))
    if not columns:
        raise TrainingError("a fusion needs scores that differ")
    means = [float(values.mean()) for _, _, values in columns]
    scales = [float(values.std()) for _, _, values in columns]
    features = np.stack(
        [(v - mean) / scale for (_, _, v), mean, scale in zip(columns, means, scales, strict=True)],
        axis=1,
    )
    model = needed("sklearn.linear_model").LogisticRegression(C=strength, max_iter=10_000, tol=1e-8)
    model.fit(features, right)
    parts = zip(columns, means, scales, model.coef_[0].tolist(), strict=True)
    return Fusion(
        features=tuple(
            Feature(member=member, relative=relative, mean=mean, scale=scale, weight=weight)
            for (member, relative, _), mean, scale, weight in parts
        ),
        bias=float(model.intercept_[0]),
    )


class FusedReranker:
    """Scores by a fusion of `members`, which hold what the fusion was fitted on, by name."""

    def __init__(self, members: Mapping[str, Reranker], fusion: Fusion) -> None:
        if missing := set(fusion.members) - members.keys():
            raise ArtefactError(f"the fusion needs a re-ranker '{min(missing)}'")
        self.members = {name: members[name] for name in fusion.members}
        self.fusion = fusion

    def score(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        retrieved: Sequence[Sequence[float]],
        *,
        on_pairs: OnPairs | None = None,
    ) -> Scores:
        """Return probabilities; `on_pairs` counts a pair once, while the last member scores."""
        check_shapes(questions, passages, retrieved)
        last = self.fusion.members[-1]
        told: dict[str, Callable[[int], None] | None] = {last: on_pairs}
        scores = {
            name: member.score(questions, passages, retrieved, on_pairs=told.get(name))
            for name, member in self.members.items()
        }
        return self.fusion.probabilities(scores)


def save_fusion(fusion: Fusion, path: Path) -> None:
    """Write a fusion as JSON, atomically."""
    write_json(path, fusion.model_dump(mode="json"))


def load_fusion(path: Path) -> Fusion:
    """Read a fusion; raises `ArtefactError` that names the file and what is wrong with it."""
    try:
        return Fusion.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{path}: not a fusion: {reason}") from error


def _values(rows: Sequence[Sequence[float]], *, relative: bool) -> Values:
    """Return the values of one feature for all passages, question by question."""
    parts = [np.asarray(row, dtype=np.float64) for row in rows if len(row)]
    if relative:
        parts = [part - part.max() for part in parts]
    return np.concatenate(parts) if parts else np.zeros(0)
