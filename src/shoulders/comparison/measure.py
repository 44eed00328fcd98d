"""Measuring a finished run: answers to the test rows, latency, and whether others changed it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from shoulders.comparison.frozen import Frozen, Rows
from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.evaluation.evaluate import dump_predictions, evaluate
from shoulders.lm.decode import DecodingConfig
from shoulders.skills.skill import Skill
from shoulders.training.monitor import quiet_progress

LATENCY_ROWS, LATENCY_TOKENS = 8, 16
INTERFERENCE_ROWS = 32


def measured(
    skill: Skill,
    method: Method,
    seed: int,
    ledger: Ledger,
    texts: Sequence[str],
    rows: Rows,
    decoding: DecodingConfig,
    console: Console,
    facts: dict[str, Any],
) -> None:
    """Ask the test rows, keep the answers, and note the run."""
    asked = [Row(r.task, t, r.targets, r.options) for r, t in zip(rows.test, texts, strict=True)]
    with quiet_progress(console, f"asking {method.name}", len(asked)) as advance:
        result = evaluate(skill, asked, Templates(), decoding=decoding, on_rows=advance)
    dump_predictions(ledger.predictions(method.name, seed), result.predictions)
    score = result.metrics["exact_match"]
    facts = {"trained_parameters": 0, "latency_ms": latency(skill, texts), **facts}
    ledger.add(
        {
            "stage": "run",
            "method": method.name,
            "family": method.family,
            "seed": seed,
            **facts,
            "exact_match": score,
            "ci95": list(result.ci95["exact_match"]),
            "f1": result.metrics["f1"],
            "answer_seconds": result.seconds,
            "tasks": {t: v["exact_match"] for t, v in result.tasks.items()},
        }
    )
    console.print(f"  {method.name}, seed {seed}: exact match {score:.1f}")


def latency(skill: Skill, texts: Sequence[str]) -> float:
    """Return the median milliseconds to answer one row alone with `LATENCY_TOKENS` new tokens."""
    decoding = DecodingConfig(max_new_tokens=LATENCY_TOKENS, min_new_tokens=LATENCY_TOKENS)
    seconds = []
    for text in texts[:: max(1, len(texts) // LATENCY_ROWS)][:LATENCY_ROWS]:
        began = time.perf_counter()
        skill.generate([text], decoding)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def interference(
    first: Method, frozen: Frozen, ledger: Ledger, plan: Plan, rows: Rows, decoding: DecodingConfig
) -> dict[str, Any]:
    """Ask the skill that was trained first again, after all others: how many answers changed?"""
    seed = plan.seeds[0]
    asked = rows.test[:INTERFERENCE_ROWS]
    skill = frozen.skill(ledger.folder(first.name, seed))
    again = evaluate(skill, asked, rows.templates, decoding=decoding)
    then = ledger.answers(first.name, seed)[: len(asked)]
    changed = sum(a != p.prediction for a, p in zip(then, again.predictions, strict=True))
    return {"asked": len(asked), "changed": changed}


def once(
    ledger: Ledger, stage: str, method: str, seed: int, measure: Callable[[], dict[str, Any]]
) -> None:
    """Note a measurement, if it is not there yet."""
    key = {"stage": stage, "method": method, "seed": seed}
    if ledger.find(**key) is None:
        ledger.add({**key, **measure()})
