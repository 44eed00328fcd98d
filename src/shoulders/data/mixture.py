"""Mixing tasks: how often each is drawn, and an order that any position can recompute."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import DataError, RecipeError, nearest

# Positions are shuffled within blocks of this many. A constant, not a setting: it is part of
# the order, and an order that changes between two versions would break resuming.
BLOCK = 256


class MixtureConfig(BaseModel):
    """Which files and tasks to mix, and how often to draw each task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: list[str] = Field(min_length=1)
    """Files or folders with the rows to train on."""
    validation: list[str] = []
    """Files or folders with the rows to select on."""
    templates: str | None = None
    """A YAML file of templates; without one, the text is the input alone."""
    cap: int | None = Field(default=None, ge=1)
    """Count no task as larger than this (T5's examples-proportional mixing)."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Raise rates to 1/temperature: 1 is proportional, large values near equal."""
    tasks: list[str] | None = Field(default=None, min_length=1)
    """Keep only these tasks."""
    exclude: list[str] = []
    """Leave these tasks out."""
    examples: int | None = Field(default=None, ge=1)
    """Draw only so many examples (all files together), then the same ones again in another order;
    without it, go on to further rows."""
    seed: int | None = Field(default=None, ge=0)
    """Draw the examples that a run of this seed draws, whatever the run's own, which then only says
    in which order: so that several runs read the same ones. Needs `examples`; None: the run's."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> MixtureConfig:
        both = sorted(set(self.tasks or ()) & set(self.exclude))
        if both:
            raise ValueError(f"'{both[0]}' is in both tasks and exclude; remove it from one")
        if self.seed is not None and self.examples is None:
            raise ValueError("seed says which examples are drawn: say how many (examples)")
        return self


def mixing_rates(
    counts: Mapping[str, int], cap: int | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """Return each task's share of the draws; the shares sum to 1.

    A task of n rows has the share min(n, cap) ** (1 / temperature), normalised, as in T5
    (Raffel et al. 2020, section 3.5.2). Raises `DataError` for a task without rows and
    `RecipeError` for settings that leave a task undrawn.
    """
    if not counts:
        raise DataError("the mixture has no tasks; name at least one file with rows")
    for task, count in counts.items():
        if count < 1:
            raise DataError(f"task '{task}' has no rows; add some or leave the task out")
    if cap is not None and cap < 1:
        raise RecipeError(f"cap is {cap}; it must be at least 1, or left out")
    if not (math.isfinite(temperature) and temperature > 0):
        raise RecipeError(f"temperature is {temperature}; it must be above 0")
    sizes = {task: count if cap is None else min(count, cap) for task, count in counts.items()}
    largest = max(sizes.values())  # dividing by it first keeps low temperatures from overflowing
    weights = {task: (size / largest) ** (1 / temperature) for task, size in sizes.items()}
    total = math.fsum(weights.values())
    rates = {task: weight / total for task, weight in weights.items()}
    for task, rate in rates.items():
        if rate < 1e-12:
            raise RecipeError(f"task '{task}' would never be drawn; raise temperature")
    return rates


def select_rows(
    rows: Iterable[Row],
    config: MixtureConfig,
    *,
    named: Iterable[str] = (),
    missing_ok: bool = False,
) -> list[Row]:
    """Keep the rows of the tasks that `config.tasks` and `config.exclude` leave.

    `named` are further task names known to exist (those with templates), to tell a task
    without rows from a misspelt one. With `missing_ok` a task may be absent, for a validation
    split that lacks it. Raises `DataError` for unknown, empty or no tasks.
    """
    rows = list(rows)
    present = {row.task for row in rows}
    known = present | set(named)
    for name in [] if missing_ok else [*(config.tasks or ()), *config.exclude]:
        if name not in known:
            raise DataError(f"unknown task '{name}'{nearest(name, sorted(known))}")
        if name not in present and name not in config.exclude:
            raise DataError(f"task '{name}' has no rows; add some or remove it from 'tasks'")
    kept = (present if config.tasks is None else set(config.tasks)) - set(config.exclude)
    chosen = [row for row in rows if row.task in kept]
    if not chosen and not missing_ok:
        raise DataError("no rows are left in the mixture; check 'tasks' and 'exclude'")
    return chosen


def draws_before(
    n: int, rate: NDArray[np.float64], phase: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return how often each task is among the first `n` draws ([tasks]; the sum is `n`).

    Draw k of a task is due at (k + phase) / rate; the earliest come first. `rate` (above 0, sum
    1) and `phase` (in [0, 1)) are [tasks]. Takes O(tasks), whatever `n`.
    """
    # A task has at most time * rate + 1 draws before a time, and at least time * rate - 1, so
    # the n-th draw of all lies within `tasks` of time n. Take what is surely among the first n
    # for granted and rank the few others one by one. Only `due` decides, so results for
    # different n are prefixes of one order, whatever the rounding of the bounds.
    slack = len(rate) + 2 + 1e-9 * n
    low = np.maximum(np.floor((n - slack) * rate) - 2, 0).astype(np.int64)
    high = np.ceil((n + slack) * rate).astype(np.int64) + 2
    task = np.repeat(np.arange(len(rate)), high - low)
    starts = np.cumsum(high - low) - (high - low)
    k = np.arange(len(task)) - starts[task] + low[task]
    due = (k + phase[task]) / rate[task]
    first = np.lexsort((k, task, due))[: n - int(low.sum())]
    return low + np.bincount(task[first], minlength=len(rate))


class Mixture:
    """An endless order of examples in which position i is a pure function of (seed, i).

    *Which task.* Task t with rate r is due at the times (k + phase) / r for k = 0, 1, 2...,
    where its phase in [0, 1) is drawn from the seed. The first n positions hold the n earliest
    of all these draws. So counts never shrink as n grows; every task keeps close to its rate at
    any n, however rare it is (at equal rates, always within two draws of n / tasks); and the
    counts before any position cost O(tasks), without a scan from 0 (`draws_before`). The draws
    of each block of `BLOCK` positions are then shuffled with a seed of their own.

    *Which row.* The k-th draw of a task of n rows is number k mod n of the task's permutation
    for epoch k div n: every row is seen once before any is seen twice. A row starts at a random
    template and moves on by one each epoch, so that it meets all of them.

    *Few examples, several times.* With `config.examples` n, position i >= n is example number
    i mod n of a shuffle of the first n, with one for each i div n, under its next template. With
    another `config.seed` than the run's they are drawn by it, and shuffled by the run's, the first
    time too.

    All randomness is raw PCG64 output, which NumPy promises not to change (unlike the methods
    of its generators), seeded by hashes of (seed, purpose, ...). Orders depend on the task
    names, but not on how the rows of several tasks are interleaved in the files.
    """

    def __init__(
        self, rows: Sequence[Row], templates: Templates, config: MixtureConfig, seed: int
    ) -> None:
        """Select and group `rows`; raises `DataError` if a task's templates fail on its rows."""
        # NumPy integers have another repr, which `_random` hashes.
        self._order = int(seed)
        self._seed = self._order if config.seed is None else config.seed
        self._templates = templates
        groups: dict[str, list[Row]] = {}
        for row in select_rows(rows, config, named=templates.named_tasks()):
            groups.setdefault(row.task, []).append(row)
        self._tasks = sorted(groups)
        self._rows = [groups[task] for task in self._tasks]
        for group in self._rows:
            templates.texts(group[0])  # a broken template should not wait for its first draw
        counts = {task: len(groups[task]) for task in self._tasks}
        self._examples = config.examples
        self._rates = mixing_rates(counts, config.cap, config.temperature)
        self._rate = np.array([self._rates[task] for task in self._tasks])
        self._phase = np.array(
            [self._random(1, "phase", task)[0] / 2.0**64 for task in self._tasks]
        )
        # The latest permutation of each task and the latest block. Both only save recomputing:
        # they never change what `example` returns.
        self._permutations: dict[int, tuple[int, NDArray[np.int64]]] = {}
        self._again: tuple[int, NDArray[np.int64]] | None = None
        self._block: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @property
    def rates(self) -> dict[str, float]:
        """Return each task's share of the draws."""
        return dict(self._rates)

    @property
    def sizes(self) -> dict[str, int]:
        """Return each task's number of rows."""
        return {task: len(rows) for task, rows in zip(self._tasks, self._rows, strict=True)}

    def example(self, i: int) -> tuple[Row, str]:
        """Return the row at position `i` >= 0 and its text under the template drawn for it."""
        if i < 0:
            raise ValueError(f"position {i} is negative")
        again, i = divmod(int(i), self._examples) if self._examples else (0, int(i))
        if again or self._order != self._seed:
            i = int(self._repeated(again)[i])
        block, offset = divmod(i, BLOCK)
        tasks, draws = self._block_draws(block)
        t, draw = int(tasks[offset]), int(draws[offset])
        epoch, place = divmod(draw, len(self._rows[t]))
        index = int(self._permutation(t, epoch)[place])
        row = self._rows[t][index]
        first = int(self._random(1, "template", row.task, index)[0] % 2**32)
        return row, self._templates.render(row, first + epoch + again)

    def window(self, start: int, count: int) -> list[tuple[Row, str]]:
        """Return the examples at `start`, ..., `start + count - 1`."""
        return [self.example(i) for i in range(start, start + count)]

    def _block_draws(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return task index and draw number (both [BLOCK]) at each position of a block."""
        if self._block is None or self._block[0] != block:
            before = draws_before(block * BLOCK, self._rate, self._phase)
            inside = draws_before((block + 1) * BLOCK, self._rate, self._phase) - before
            tasks = np.repeat(np.arange(len(self._tasks)), inside)
            tasks = tasks[self._shuffle(BLOCK, "block", block)]
            draws = np.empty_like(tasks)
            for t in np.flatnonzero(inside):
                draws[tasks == t] = before[t] + np.arange(inside[t])
            self._block = (block, tasks, draws)
        return self._block[1], self._block[2]

    def _permutation(self, t: int, epoch: int) -> NDArray[np.int64]:
        cached = self._permutations.get(t)
        if cached is None or cached[0] != epoch:
            order = self._shuffle(len(self._rows[t]), "rows", self._tasks[t], epoch)
            self._permutations[t] = cached = (epoch, order)
        return cached[1]

    def _repeated(self, again: int) -> NDArray[np.int64]:
        """Return the order of the first examples when they are read the `again`-th time more."""
        assert self._examples is not None
        if self._again is None or self._again[0] != again:
            purpose = "again" if self._order == self._seed else f"ordered by {self._order}"
            self._again = (again, self._shuffle(self._examples, purpose, again))
        return self._again[1]

    def _shuffle(self, size: int, *purpose: Any) -> NDArray[np.int64]:
        return np.argsort(self._random(size, *purpose), kind="stable")

    def _random(self, size: int, *purpose: Any) -> NDArray[np.uint64]:
        """Return `size` random 64-bit numbers that depend on the seed and `purpose` alone."""
        digest = hashlib.sha256(repr((self._seed, *purpose)).encode()).digest()
        return np.random.PCG64(int.from_bytes(digest)).random_raw(size)
