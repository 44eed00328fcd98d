"""What `shoulders compare` does, from top to bottom: load, plan, search, train, measure, report."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.comparison.budget import with_examples
from shoulders.comparison.frozen import Frozen
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method, methods_of
from shoulders.comparison.plan import Plan
from shoulders.comparison.rows import digest_of, rows_of, tasks_of
from shoulders.comparison.setting import Setting
from shoulders.comparison.stages import (
    ask_first_again,
    ask_untrained,
    check_windows,
    in_order,
    search_rates,
    time_answers,
    train_and_ask,
    unfinished,
)
from shoulders.comparison.tuned import Tuned
from shoulders.errors import ShouldersError, TrainingError, require
from shoulders.files import only_writer
from shoulders.lm.load import load_lm
from shoulders.machine import machine


def run_comparison(
    plan: Plan,
    out: Path | str,
    *,
    resume: bool = False,
    finished: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train and measure everything that a plan names, and return every figure.

    Finished runs are kept in `out` and not repeated; a run that was stopped goes on (frozen
    methods and rivals from their last checkpoint). With `finished` nothing more is
    trained: what is finished is compared, and what is not is listed as `unfinished`.

    Raises:
        TrainingError: `out` holds another comparison, or this one without `resume`.
        DataError, LMError, ShouldersError: what cannot be read, or failed; or another process
            writes there.
    """
    with only_writer(Path(out)):
        return _compared(plan, Path(out), resume, finished, console or Console(quiet=True))


def _compared(
    plan: Plan, out: Path, resume: bool, finished: bool, console: Console
) -> dict[str, Any]:
    started = time.monotonic()
    require("compare", *plan.libraries)
    ledger = Ledger(out)
    ledger.begin(plan, resume=resume or finished)

    # 1. One LM in memory, and the rows that every method is trained, selected and measured on.
    lm = load_lm(**plan.lm.model_dump())
    before = lm.digest()
    rows = rows_of(plan)
    if rows.seen:
        console.print(f"note: {rows.seen} test rows are trained on, and left out", markup=False)
    every = methods = methods_of(plan, lm)
    in_order(methods, ledger, plan.seeds)
    ledger.note()
    if finished:
        methods = [method for method in methods if ledger.find(stage="run", method=method.name)]
        if not methods:
            raise ShouldersError(f"{out}: nothing in it is finished yet")
    frozen, tuned = Frozen(lm, plan, rows, console), Tuned(lm, plan, rows, console)
    setting = Setting(plan, lm, rows, methods, ledger, frozen, tuned, console)

    check_windows(setting)

    # 2. The LM alone, without and with worked examples; what it is before anything is tuned.
    ask_untrained(setting)

    # 3. How many examples: as given, or what the minutes allow on this machine.
    setting = setting if finished else with_examples(setting, started)

    # 4. The same tuning effort for each, on validation rows; then its runs, measured on test.
    for method in [] if finished else setting.trained:
        factor = search_rates(setting, method)
        for seed in plan.seeds:
            if not ledger.find(stage="run", method=method.name, seed=seed):
                train_and_ask(setting, method, seed, factor)

    # 5. What an answer takes: by turns, when all is trained.
    time_answers(setting)

    # 6. Nothing was forgotten, and no skill has changed another: measured, not only promised.
    after = lm.digest()
    if after != before:
        raise TrainingError("the frozen LM changed during the comparison; its figures are void")
    left = unfinished(plan, every, ledger)
    if not left:  # of others that are trained later it would say nothing
        ask_first_again(setting)
    return {**_figures(setting, before, after), "unfinished": left}


def _figures(setting: Setting, before: str, after: str) -> dict[str, Any]:
    """Return what was measured, and the digests of the LM's weights before and after."""
    ledger, rows, lm, methods = setting.ledger, setting.rows, setting.lm, setting.methods
    return {
        "benchmark": "compare",
        "plan": {**setting.plan.model_dump(mode="json"), "methods": [m.name for m in methods]},
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
            **({"test_seen": rows.seen} if rows.seen else {}),
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


def _shape(method: Method) -> dict[str, Any]:
    shape = {"passes": list(method.passes), "begins_at": dict(method.start)}
    return {**shape, "joins": list(method.joins)} if method.joins else shape
