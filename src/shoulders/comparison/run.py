"""What `shoulders compare` does, from top to bottom: load, plan, search, train, measure, report."""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.comparison.bare import bare
from shoulders.comparison.budget import with_examples
from shoulders.comparison.forgetting import examined, text_of
from shoulders.comparison.frozen import Frozen, Rows, Trained
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.measure import interference, latencies, measured, once
from shoulders.comparison.methods import Method, methods_of
from shoulders.comparison.plan import Plan
from shoulders.comparison.search import best_factor
from shoulders.comparison.tuned import Tuned, plain
from shoulders.data.rows import Row, as_line
from shoulders.errors import DataError, ShouldersError, TrainingError
from shoulders.files import only_writer
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.skill import Skill
from shoulders.training.run import load_data, machine, read_all, unseen_rows
from shoulders.training.validation import choose_rows


def run_comparison(
    plan: Plan, out: Path | str, *, resume: bool = False, console: Console | None = None
) -> dict[str, Any]:
    """Train and measure everything that a plan names, and return every figure.

    Finished runs are kept in `out` and not repeated; a run that was stopped goes on (frozen
    methods from their last checkpoint, rivals from their start).

    Raises:
        TrainingError: `out` holds another comparison, or this one without `resume`.
        DataError, LMError, ShouldersError: what cannot be read, or failed; or another process
            writes there.
    """
    with only_writer(Path(out)):
        return _compared(plan, Path(out), resume, console or Console(quiet=True))


def _compared(plan: Plan, out: Path, resume: bool, console: Console) -> dict[str, Any]:
    started = time.monotonic()
    ledger = Ledger(out)
    ledger.begin(plan, resume=resume)

    # 1. One LM in memory, and the rows that every method is trained, selected and measured on.
    lm = load_lm(**plan.lm.model_dump())
    before = lm.digest()
    rows = rows_of(plan)
    methods = methods_of(plan, lm)
    in_order(methods, ledger, plan.seeds)
    ledger.note()
    frozen, tuned = Frozen(lm, plan, rows, console), Tuned(lm, plan, rows, console)
    decoding = DecodingConfig(max_new_tokens=plan.max_new_tokens)
    texts = [rows.templates.render(row, 0) for row in rows.test]

    # 2. The LM alone, without and with worked examples; what it is before anything is tuned.
    for method in methods:
        if method.family == "bare" and not ledger.find(stage="run", method=method.name):
            alone, asked = bare(method, lm, plan, rows)
            measured(alone, method, 0, ledger, asked, rows, decoding, console, {})
    text = text_of(lm, plan.forgetting, out)
    others = read_all(plan.forgetting.rows)
    rivals = any(method.family == "tuned" for method in methods)

    def untouched() -> dict[str, Any]:
        return examined(tuned.original(lm) if rivals else lm, plan.forgetting, text, others)

    once(ledger, "forgetting", "frozen", 0, untouched)

    # 3. How many examples: as given, or what the minutes allow on this machine.
    trained = [m for m in methods if m.trained]
    if trained:
        plan = with_examples(plan, trained, frozen, tuned, ledger, started, console)

    # 4. The same tuning effort for each, on validation rows; then its runs, measured on test.
    for method in trained:
        # An ensemble's rates are searched with one member: no more effort than for others.
        one = replace(method, members=1)

        def attempt(number: int, factor: float, m: Method = one) -> float:
            folder = ledger.folder(m.name, number, "trials")
            steps = max(1, round(m.steps(plan) * plan.search.share))
            settings: dict[str, Any] = {"steps": steps, "seed": 0, "factor": factor}
            begun = starts(m, ledger, plan.seeds[0])
            if m.family == "tuned":
                return tuned.train(m, folder, keep=False, **settings).loss
            return frozen.train(m, folder, start=begun, **settings).loss

        factor = 1.0 if method.joins else best_factor(method, plan.search, ledger, attempt)
        for seed in plan.seeds:
            if ledger.find(stage="run", method=method.name, seed=seed):
                continue
            steps = method.steps(plan)
            steps_said = f"of {', '.join(method.joins)}" if method.joins else f"{steps} steps"
            console.print(f"[bold]{method.name}[/], seed {seed}: {steps_said}")
            folder = ledger.folder(method.name, seed)
            settings: dict[str, Any] = {"steps": steps, "seed": seed, "factor": factor}
            if method.family == "frozen":
                begun = starts(method, ledger, seed)
                if method.joins:
                    done = frozen.join(folder, begun)
                else:
                    done = frozen.train(method, folder, start=begun, **settings)
                skill = frozen.skill(folder)
                sizes = {"trained_parameters": skill.trained_parameters}
                measured(skill, method, seed, ledger, texts, rows, decoding, console,
                         sizes | run_facts(method, plan, factor, done))  # fmt: skip
                continue
            done = tuned.train(method, folder, keep=True, **settings)
            facts = {"trained_parameters": tuned.trained_parameters(folder)}
            with tuned.skill(method, folder) as skill:
                examine = functools.partial(examined, skill.lm, plan.forgetting, text, others)
                once(ledger, "forgetting", method.name, seed, examine)
                measured(skill, method, seed, ledger, texts, rows, decoding, console,
                         facts | run_facts(method, plan, factor, done))  # fmt: skip

    # 5. What an answer takes: by turns, when all is trained. Merged, a tuned LM is as fast as the
    # LM itself in the plan's precision.
    if not all(ledger.find(stage="latency", method=m.name) for m in methods):
        asked_of: list[tuple[Skill | Ensemble, list[str]]] = []
        for method in methods:
            if method.family == "bare":
                asked_of.append(bare(method, lm, plan, rows))
            elif method.family == "tuned":
                asked_of.append((plain(lm, method), texts))
            else:
                folder = ledger.folder(method.name, plan.seeds[0])
                asked_of.append((frozen.skill(folder), texts))
        for method, ms in zip(methods, latencies(asked_of, console), strict=True):
            ledger.add({"stage": "latency", "method": method.name, "ms": ms})

    # 6. Nothing was forgotten, and no skill has changed another: measured, not only promised.
    after = lm.digest()
    if after != before:
        raise TrainingError("the frozen LM changed during the comparison; its figures are void")
    first = next((m for m in trained if m.family == "frozen"), None)
    if first is not None:
        once(ledger, "interference", first.name, plan.seeds[0],
             lambda: interference(first, frozen, ledger, plan, rows, decoding))  # fmt: skip
    return {
        "benchmark": "compare",
        "plan": plan.model_dump(mode="json"),
        "methods": [
            {"method": m.name, "family": m.family, "rank": m.rank, **_shape(m)} for m in methods
        ],
        "runs": [
            {**run, "right": ledger.right(run["method"], run["seed"])}
            for run in ledger.every(stage="run")
        ],
        "trials": ledger.every(stage="trial"),
        "forgetting": ledger.every(stage="forgetting"),
        "latency_ms": {row["method"]: row["ms"] for row in ledger.every(stage="latency")},
        "interference": ledger.every(stage="interference"),
        "test_tasks": tasks_of(rows),
        "rows": {
            "train": len(rows.train),
            "validation": len(rows.validation),
            "test": len(rows.test),
        },
        "rows_sha256": {"train": digest_of(rows.train), "test": digest_of(rows.test)},
        "lm": {
            "name": lm.name,
            "parameters": lm.parameters,
            "fingerprint": lm.fingerprint,
            "digest_before": before,
            "digest_after": after,
        },
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def rows_of(plan: Plan) -> Rows:
    """Return a plan's rows; raises `DataError` where training rows stand in the test as well."""
    train, validation, templates = load_data(plan.data)
    test = read_all(plan.test)
    if plan.test_rows is not None:
        test = choose_rows(test, plan.test_rows)
    unseen = unseen_rows(test, train)
    if len(unseen) < len(test) / 2:
        raise DataError(f"{plan.test[0]}: most of its rows are trained on; give other test rows")
    # Rates are searched on validation rows: those of the test are not to be among them.
    validation = choose_rows(unseen_rows(validation, [*train, *test]), plan.validation_rows)
    if not validation:
        raise DataError("data.validation: all of its rows are trained or tested on; give others")
    return Rows(train, validation, unseen, templates)


def tasks_of(rows: Rows) -> list[tuple[str, int]]:
    """Return the tasks of the test rows in order, each with how many rows of it follow."""
    return [
        (task, len(list(own))) for task, own in itertools.groupby(row.task for row in rows.test)
    ]


def digest_of(rows: Sequence[Row]) -> str:
    """Return the SHA-256 of rows in their order."""
    return hashlib.sha256("".join(map(as_line, rows)).encode("utf-8", "surrogatepass")).hexdigest()


def in_order(methods: Sequence[Method], ledger: Ledger, seeds: Sequence[int]) -> None:
    """Raise `ShouldersError` for a method that takes up one that will not be there by then."""
    for place, method in enumerate(methods):
        before = {other.name for other in methods[:place]}
        for seed in seeds:
            if not ledger.find(stage="run", method=method.name, seed=seed):
                starts(method, ledger, seed, before)


def starts(
    method: Method, ledger: Ledger, seed: int, promised: Collection[str] = ()
) -> dict[str, Path]:
    """Return the skills that a method's parts begin at, or that it joins.

    Raises `ShouldersError` where they are not trained, nor `promised`.
    """
    found = {}
    for part, name in (method.start | {name: name for name in method.joins}).items():
        if name not in promised and not ledger.find(stage="run", method=name, seed=seed):
            raise ShouldersError(f"{method.name} takes up {name}: list {name} before it")
        found[part] = ledger.folder(name, seed)
    return found


def run_facts(method: Method, plan: Plan, factor: float, done: Trained) -> dict[str, Any]:
    """Return what a training run cost and came to."""
    return {
        "examples": method.steps(plan) // method.epochs * plan.rows_per_step,
        "epochs": method.epochs,
        "members": method.members,
        "rate_factor": factor,
        "training_seconds": done.seconds,
        "validation_loss": done.loss,
        "curve": done.curve,
    }


def _shape(method: Method) -> dict[str, Any]:
    shape = {"passes": list(method.passes), "begins_at": dict(method.start)}
    return {**shape, "joins": list(method.joins)} if method.joins else shape
