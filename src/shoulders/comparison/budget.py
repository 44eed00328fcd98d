"""From minutes to examples: what a step of every method takes on this machine."""

from __future__ import annotations

import time
from dataclasses import replace

from shoulders.comparison.parts import BudgetConfig
from shoulders.comparison.setting import Setting
from shoulders.progress import quiet_progress

LEAST_STEPS = 10
RESERVE = 0.25  # of the minutes, for what is not a training step of a known length


def with_examples(setting: Setting, started: float) -> Setting:
    """Return the setting with its budget in examples: as given, or what its minutes allow.

    A step of every method is timed; all methods get the same number of them. `started` is when the
    comparison was (`time.monotonic`).
    """
    plan, methods, ledger, console = setting.plan, setting.trained, setting.ledger, setting.console
    minutes = plan.budget.minutes
    if minutes is None or not methods:
        return setting
    row = ledger.find(stage="budget", method="all")
    if row is None:
        steps_cost, besides = 0.0, 0.0
        # A search is made once for all seeds, with one member of an ensemble.
        tried = plan.search.trials * plan.search.share / len(plan.seeds)
        with quiet_progress(console, "timing a step of each method", len(methods)) as advance:
            for method in methods:
                often = (tried + method.members) * method.share * method.epochs
                if method.joins:
                    pass  # its members are others' already
                elif method.family == "frozen":
                    steps_cost += setting.frozen.step_seconds(method) * often
                else:
                    seconds, fixed = setting.tuned.step_seconds(method)
                    steps_cost += seconds * often
                    besides += fixed
                advance(1)
        bare_runs = ledger.every(stage="run")
        asking = max((r["answer_seconds"] for r in bare_runs), default=0.0)
        asking *= sum(method.members for method in methods)
        spent = time.monotonic() - started
        left = (minutes * 60 * (1 - RESERVE) - spent) / len(plan.seeds) - besides - asking
        steps = int(left / steps_cost)
        if steps < LEAST_STEPS:
            console.print(
                f"[yellow]{minutes:g} minutes allow {max(steps, 0)} steps of every method; taking "
                f"{LEAST_STEPS}, which takes longer. Fewer methods would help."
            )
        steps = max(steps, LEAST_STEPS)
        row = {"stage": "budget", "method": "all", "examples": steps * plan.rows_per_step}
        row = ledger.add({**row, "seconds_for_a_step_of_all": steps_cost})
    budget = BudgetConfig(examples=row["examples"], parameters=plan.budget.parameters)
    return replace(setting, plan=plan.model_copy(update={"budget": budget}))
