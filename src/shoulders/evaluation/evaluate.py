"""Evaluate a skill on rows: answers, exact match, F1, rank accuracy, intervals, by task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import DataError, placed
from shoulders.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    macro_average,
    normalize,
    normalize_squad,
    token_f1,
)
from shoulders.files import atomic_path
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.score import Score
from shoulders.skills.reader import first_line

Normalizer = Literal["general", "squad"]
EVALUATION_DECODING = DecodingConfig(max_new_tokens=32)


class Answering(Protocol):
    """What can be evaluated: a `Skill`, one behind a gate, one behind an engine."""

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """See `Skill.generate`."""
        ...

    def score(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Score]]:
        """See `Skill.score`."""
        ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """One row's answer and its scores in 0..1; `rank_accuracy` is None without options."""

    task: str
    input: str
    prediction: str
    targets: tuple[str, ...]
    exact_match: float
    f1: float
    rank_accuracy: float | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one skill on one file, as percentages.

    `metrics` are macro averages over tasks; `ci95` their stratified bootstrap intervals;
    `tasks` each task's own averages with its number of rows `n`.
    """

    n: int
    seconds: float
    metrics: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    tasks: dict[str, dict[str, float]]
    predictions: list[Prediction]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the predictions, for JSON."""
        return {
            "n": self.n,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "ci95": {name: list(bounds) for name, bounds in self.ci95.items()},
            "tasks": self.tasks,
        }


def evaluate(
    skill: Answering,
    rows: Sequence[Row],
    templates: Templates,
    *,
    decoding: DecodingConfig = EVALUATION_DECODING,
    normalizer: Normalizer = "general",
    on_rows: Callable[[int], None] | None = None,
    rank: bool = True,
) -> Evaluation:
    """Answer every row under its task's first template and score the answers.

    Args:
        skill: a skill or the base LM.
        rows: rows with targets; those with `options` are also ranked by likelihood.
        templates: the first template of a row's task is used.
        decoding: greedy and at most 32 tokens by default; the answer is the first line.
        normalizer: what exact match compares: `general` (see `metrics.normalize`) or SQuAD's.
        on_rows: called with the number of rows after each batch.
        rank: whether to rank options at all.

    Returns:
        Exact match, F1 and, where rows have options, rank accuracy: percentages with 95%
        intervals, overall and by task, and every answer (scores from 0 to 1).

    Raises:
        DataError: no rows.
        ValueError: a row without targets.
        WindowError: names the file and line of the row that does not fit the LM's window; its
            number (from 1), where rows come from no file.
    """
    if not rows:
        raise DataError("no rows: there is nothing to answer")
    started = time.perf_counter()
    texts = [templates.render(row, 0) for row in rows]
    with placed(texts, [row.where or f"row {i}" for i, row in enumerate(rows, 1)]):
        answers = skill.generate(texts, decoding, on_rows=on_rows)
        ranked = _rank(skill, rows, texts) if rank else {}
    compare = normalize if normalizer == "general" else normalize_squad
    predictions = [
        Prediction(
            task=row.task,
            input=text,
            prediction=answer,
            targets=row.targets,
            exact_match=exact_match(answer, row.targets, compare),
            f1=token_f1(answer, row.targets),
            rank_accuracy=ranked.get(i),
            logprob=several[0].logprob,
        )
        for i, (row, text, several) in enumerate(zip(rows, texts, answers, strict=True))
        for answer in [first_line(several[0].text)]
    ]
    return summarise(predictions, time.perf_counter() - started)


def summarise(predictions: Sequence[Prediction], seconds: float) -> Evaluation:
    """Average predictions by task and over tasks, with bootstrap intervals."""
    metrics: dict[str, float] = {}
    ci95: dict[str, tuple[float, float]] = {}
    tasks: dict[str, dict[str, float]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, {"n": 0})["n"] += 1
    for name in ("exact_match", "f1", "rank_accuracy"):
        scores: dict[str, list[float]] = {}
        for prediction in predictions:
            value = getattr(prediction, name)
            if value is not None:
                scores.setdefault(prediction.task, []).append(value)
        if scores:
            metrics[name] = macro_average(scores)
            ci95[name] = bootstrap_interval(scores)
            for task, values in scores.items():
                tasks[task][name] = 100 * sum(values) / len(values)
    ordered = {task: tasks[task] for task in sorted(tasks)}
    return Evaluation(len(predictions), seconds, metrics, ci95, ordered, list(predictions))


def dump_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Write one JSON object per row to `path`, atomically."""
    import json

    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")


def _rank(skill: Answering, rows: Sequence[Row], texts: Sequence[str]) -> dict[int, float]:
    """Return, for rows with options, whether the likeliest one is a target (T0's metric)."""
    choosing = [i for i, row in enumerate(rows) if row.options]
    if not choosing:
        return {}
    options = [list(rows[i].options or ()) for i in choosing]
    scored = skill.score([texts[i] for i in choosing], options)
    results = {}
    for i, names, scores in zip(choosing, options, scored, strict=True):
        best = max(range(len(names)), key=lambda k: scores[k].logprob)
        results[i] = float(names[best] in rows[i].targets)
    return results
