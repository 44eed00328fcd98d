"""From runs to one line per method, and to differences that can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean as mean
from typing import Any

from shoulders.evaluation.metrics import bootstrap_interval, paired_interval

BYTES = 4  # of a trained parameter, as it is stored
ROUNDING = 1e-9  # of a sum of shares: what is below is nothing
CLOSE = 2.0  # points: an interval within them on either side says level, a wider one says little


@dataclass(frozen=True)
class Line:
    """One method over its seeds.

    Attributes:
        name, family: as in the plan.
        exact_match: macro average over tasks, mean over seeds, in percent.
        ci95: its bootstrap interval over test rows.
        by_seed: of each seed; empty where tasks were left out.
        tasks: of each task.
        trained_parameters: outside the LM, or of it.
        examples: that it learned from, those of what it begins at included.
        epochs: how often it read them.
        members: skills that answer together, each of which did.
        training_seconds: mean over seeds.
        latency_ms: of one answer, see `latencies`.
        scores: of each test row from 0 to 1, the mean over seeds, by task.
        perplexity, zero_shot: what a tuned LM has on other text and tasks.
        seeds: that it was trained with.
        f1: macro average over tasks, mean over seeds, in percent.
        perplexity_before: of the LM that it is a copy of, on the same text; None where it is the
            comparison's own.
    """

    name: str
    family: str
    exact_match: float
    ci95: tuple[float, float]
    by_seed: list[float]
    tasks: dict[str, float]
    trained_parameters: int
    examples: int
    epochs: int
    members: int
    training_seconds: float
    latency_ms: float
    scores: Mapping[str, Sequence[float]]
    perplexity: float | None
    zero_shot: float | None
    seeds: tuple[int, ...] = ()
    f1: float | None = None
    perplexity_before: float | None = None

    @property
    def bytes_per_task(self) -> int:
        """What one more task takes on disk and in memory beside the LM."""
        return BYTES * self.trained_parameters

    @property
    def examples_read(self) -> str:
        """For a table: the examples, how often they were read if more than once, and by whom."""
        read = f"{self.examples:,}" + (f" x {self.epochs}" if self.epochs > 1 else "")
        return f"{read}, by {self.members} members" if self.members > 1 else read


def lines(result: dict[str, Any]) -> list[Line]:
    """Return a line for every method that has a finished run, in the plan's order."""
    tasks = [task for task, count in result["test_tasks"] for _ in range(count)]
    begun = {m["method"]: set(m["begins_at"].values()) for m in result["methods"]}
    found = []
    for name in (m["method"] for m in result["methods"]):
        runs = [run for run in result["runs"] if run["method"] == name]
        if not runs:
            continue
        right = [[float(one) for one in run["right"]] for run in runs]
        scores = averaged([list(zip(tasks, own, strict=True)) for own in right])
        seed = runs[0]["seed"]
        before = [r for r in result["runs"] if r["method"] in begun[name] and r["seed"] == seed]
        forgot = [f for f in result["forgetting"] if f["method"] == name]
        zero = [f["zero_shot"] for f in forgot if "zero_shot" in f]
        found.append(
            Line(
                name=name,
                family=runs[0]["family"],
                exact_match=mean([run["exact_match"] for run in runs]),
                ci95=bootstrap_interval(scores),
                by_seed=[run["exact_match"] for run in runs],
                tasks={task: 100 * mean(values) for task, values in sorted(scores.items())},
                trained_parameters=runs[0]["trained_parameters"],
                examples=sum(run.get("examples", 0) for run in [runs[0], *before]),
                epochs=runs[0].get("epochs", 1),
                members=runs[0].get("members", 1),
                training_seconds=mean([r.get("training_seconds", 0.0) for r in runs])
                + sum(r.get("training_seconds", 0.0) for r in before),
                latency_ms=result["latency_ms"][name],
                scores=scores,
                perplexity=mean([f["perplexity"] for f in forgot]) if forgot else None,
                zero_shot=mean(zero) if zero else None,
                seeds=tuple(run["seed"] for run in runs),
                f1=mean(f1) if (f1 := [r["f1"] for r in runs if "f1" in r]) else None,
                perplexity_before=forgot[0].get("before") if forgot else None,
            )
        )
    return found


def averaged(seeds: Sequence[Sequence[tuple[str, float]]]) -> dict[str, list[float]]:
    """Return every row's mean over seeds, by task; rows stand in the same order in each."""
    scores: dict[str, list[float]] = {}
    for several in zip(*seeds, strict=True):
        scores.setdefault(several[0][0], []).append(mean([score for _, score in several]))
    return scores


@dataclass(frozen=True, slots=True)
class Difference:
    """How much better one method is than another, in points, with its paired interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> int:
        """1: better outside the interval; -1: worse; 0: neither."""
        return (self.low > 0) - (self.high < 0)

    @property
    def word(self) -> str:
        """better, worse, level (so near 0 that it hardly matters) or undecided."""
        if self.sure:
            return "better" if self.sure > 0 else "worse"
        return "level" if max(-self.low, self.high) <= CLOSE else "undecided"

    def __str__(self) -> str:
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}] points"


def difference(first: Line, second: Line) -> Difference:
    """Return how much better `first` is on the same rows."""
    return Difference(*paired_interval(first.scores, second.scores))


def rests_on(ahead: Line, behind: Line) -> list[str]:
    """Return the fewest tasks without which `ahead` would not be ahead of `behind`.

    The macro average is a mean over tasks, so that taking away the tasks with the greatest gains
    first finds the fewest. Empty where `ahead` is not ahead.
    """
    gains = {t: mean(values) - mean(behind.scores[t]) for t, values in ahead.scores.items()}
    left, found = sum(gains.values()), []
    for task in sorted(gains, key=lambda t: (-gains[t], t)):
        if left <= ROUNDING:
            break
        left -= gains[task]
        found.append(task)
    return found


def without(line: Line, tasks: Sequence[str]) -> Line:
    """Return `line` as it is over all tasks but these; `ValueError` where none is left."""
    scores = {task: values for task, values in line.scores.items() if task not in tasks}
    if not scores:
        raise ValueError("no task would be left")
    return replace(
        line,
        scores=scores,
        tasks={task: 100 * mean(values) for task, values in sorted(scores.items())},
        exact_match=100 * mean([mean(values) for values in scores.values()]),
        ci95=bootstrap_interval(scores),
        by_seed=[],
    )


def best(found: Sequence[Line]) -> Line | None:
    """Return the method with the highest exact match; of equal ones the smaller."""
    return max(found, key=lambda line: (line.exact_match, -line.trained_parameters), default=None)


def lead(found: Sequence[Line]) -> dict[str, Any] | None:
    """Return the tasks that the lead between frozen and tuned rests on, and means without them.

    `None` where one of the two was not run, where neither is ahead, and where it takes all tasks.
    """
    frozen, tuned = (best([x for x in found if x.family == f]) for f in ("frozen", "tuned"))
    if frozen is None or tuned is None:
        return None
    tasks = rests_on(frozen, tuned) or rests_on(tuned, frozen)
    if not tasks or len(tasks) == len(frozen.scores):
        return None
    means = {line.name: without(line, tasks).exact_match for line in found}
    return {"tasks": tasks, "exact_match_without": means}
