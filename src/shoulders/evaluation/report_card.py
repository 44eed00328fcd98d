"""The report card of a reader: which stage loses the answers?

Retrieved among the first k (of all, where fewer were retrieved) -> re-ranked -> packed into the
window -> answered, each in percent of the questions, with a bootstrap interval.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoulders.errors import ShouldersError, install
from shoulders.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    normalize_squad,
    token_f1,
)
from shoulders.files import atomic_path
from shoulders.reader.answers import has_answer
from shoulders.reader.contexts import Ranked
from shoulders.reader.passage import Passage
from shoulders.reader.questions import Question, check_answered
from shoulders.skills.reader import Answer, Reader

HITS_AT = (1, 4, 20)


@dataclass(frozen=True, slots=True)
class ReportCard:
    """Scores of one reader on one file of questions, as percentages.

    Attributes:
        n: questions.
        seconds: for finding passages (`search`) and for answering (`read`).
        metrics: by name; those `_given_packed` are over the questions whose window holds an
            answer.
        ci95: their bootstrap intervals over questions.
        answers: in the order of the questions.
    """

    n: int
    seconds: dict[str, float]
    metrics: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the answers, for JSON."""
        return {
            "n": self.n,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "ci95": {name: list(bounds) for name, bounds in self.ci95.items()},
        }


def report_card(
    reader: Reader,
    questions: Sequence[Question],
    *,
    on_search: Callable[[int], None] | None = None,
    on_read: Callable[[int], None] | None = None,
) -> ReportCard:
    """Answer questions and score every stage.

    Exact match and F1 are SQuAD's, as DPR and FiD report them.

    Raises:
        DataError: a question has no answers to compare with.
    """
    check_answered(questions)
    started = time.perf_counter()
    ranked = reader.contexts.ranked(questions, on_search)
    found = time.perf_counter()
    answers = reader.answer(questions, ranked, on_rows=on_read)
    seconds = {"search": found - started, "read": time.perf_counter() - found}
    scores = _scores(questions, ranked, answers)
    packed = scores["packed_answer_hit"]
    for name in ("exact_match", "f1"):
        given = [s for s, hit in zip(scores[name], packed, strict=True) if hit]
        if given:
            scores[f"{name}_given_packed"] = given
    return ReportCard(
        n=len(questions),
        seconds=seconds,
        metrics={name: 100 * sum(own) / len(own) for name, own in scores.items()},
        ci95={name: _interval(own) for name, own in scores.items()},
        answers=answers,
    )


def _interval(scores: Sequence[float]) -> tuple[float, float]:
    """Return a mean's bootstrap interval in percent; counts may be above 1, scores are not."""
    most = max(1.0, *scores)
    low, high = bootstrap_interval({"all": [score / most for score in scores]})
    return most * low, most * high


def _scores(
    questions: Sequence[Question], ranked: Sequence[Ranked], answers: Sequence[Answer]
) -> dict[str, list[float]]:
    """Return every score of every question, from 0 to 1, by name."""
    scores: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        scores.setdefault(name, []).append(float(value))

    for question, found, answer in zip(questions, ranked, answers, strict=True):
        right = question.answers
        note("exact_match", exact_match(answer.text, right, normalize_squad))
        note("f1", token_f1(answer.text, right))
        for stage, passages in (("retrieved", found.retrieved), ("reranked", found.passages)):
            first = first_with_answer(passages, right)
            for k in HITS_AT:
                note(f"{stage}_answer_hit_at_{k}", first is not None and first < k)
        read = first_with_answer(answer.packed.used, right)
        note("packed_answer_hit", read is not None)
        note("packed_passages", len(answer.packed.used) / 100)  # a mean, not a percentage
        note("abstained", answer.abstained)
    return scores


def first_with_answer(passages: Sequence[Passage], answers: Sequence[str]) -> int | None:
    """Return the place of the first passage whose text holds an answer, or None."""
    return next((i for i, p in enumerate(passages) if has_answer(p.text, answers)), None)


def dump_answers(path: Path, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
    """Write one JSON object per question to `path`, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers, strict=True):
            entry = {
                "question": question.question,
                "answers": list(question.answers),
                "prediction": answer.text,
                "proposed": answer.proposed,
                "confidence": answer.confidence,
                "exact_match": exact_match(answer.text, question.answers, normalize_squad),
                "packed": [p.id for p in answer.packed.used],
                "packed_answer_hit": first_with_answer(answer.packed.used, question.answers)
                is not None,
                "left_out": list(answer.packed.left_out),
            }
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def pyplot() -> Any:
    """Return matplotlib's, drawing into files; raises `ShouldersError` where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ShouldersError(f"plots need matplotlib; run: {install('train')}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_report_card(metrics: dict[str, float], path: Path) -> None:
    """Draw the stages as bars, left to right, to see where answers are lost."""
    plt = pyplot()
    names = [f"{stage}_answer_hit_at_{k}" for stage in ("retrieved", "reranked") for k in HITS_AT]
    names += ["packed_answer_hit", "f1", "exact_match"]
    labels = [n.replace("_answer_hit_at_", "\n@").replace("_answer_hit", "").replace("_", "\n")
              for n in names]  # fmt: skip
    kinds = {"retrieved": "tab:gray", "reranked": "tab:blue", "packed": "tab:orange"}
    colours = [kinds.get(n.partition("_")[0], "tab:green") for n in names]
    figure, axes = plt.subplots(figsize=(9, 4))
    bars = axes.bar(labels, [metrics[n] for n in names], color=colours)
    axes.bar_label(bars, fmt="%.1f")
    axes.set(ylabel="% of questions", ylim=(0, 108))
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
