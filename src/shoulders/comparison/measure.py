"""Measuring a finished run: answers to the test rows, latency, and whether others changed it."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from shoulders.comparison.ledger import Ledger
from shoulders.comparison.methods import Method
from shoulders.comparison.setting import Setting
from shoulders.data.templates import Templates
from shoulders.evaluation.evaluate import dump_predictions, evaluate
from shoulders.lm.decode import DecodingConfig
from shoulders.progress import quiet_progress
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.skill import Skill

LATENCY_ROWS, LATENCY_TOKENS = 8, 16
INTERFERENCE_ROWS = 32


def measured(
    setting: Setting,
    method: Method,
    seed: int,
    skill: Skill | Ensemble,
    texts: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """Ask a method's skill the test rows as `texts`, keep the answers, and note the run."""
    ledger, console = setting.ledger, setting.console
    asked = [replace(row, input=t) for row, t in zip(setting.rows.test, texts, strict=True)]
    with quiet_progress(console, f"asking {method.name}", len(asked)) as advance:
        result = evaluate(skill, asked, Templates(), decoding=setting.decoding, on_rows=advance)
    dump_predictions(ledger.predictions(method.name, seed), result.predictions)
    score = result.metrics["exact_match"]
    facts = {"trained_parameters": 0, **facts}
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


def latencies(
    asked: Sequence[tuple[Skill | Ensemble, Sequence[str]]], console: Console
) -> list[float]:
    """Return median milliseconds to answer one row alone with `LATENCY_TOKENS` new tokens.

    All answer in turn, in an order that changes from row to row, so that whatever else the machine
    does falls on all of them alike. Encoders are to keep nothing on disk: a user's question is new.

    Args:
        asked: skills, and the test rows' texts as each is asked them.
        console: for progress.
    """
    decoding = DecodingConfig(max_new_tokens=LATENCY_TOKENS, min_new_tokens=LATENCY_TOKENS)
    seconds: list[list[float]] = [[] for _ in asked]
    with quiet_progress(console, "timing answers", LATENCY_ROWS + 1) as advance:
        for turn in range(LATENCY_ROWS + 1):
            for i in random.Random(turn).sample(range(len(asked)), len(asked)):
                skill, texts = asked[i]
                text = texts[turn * len(texts) // (LATENCY_ROWS + 1)]
                began = time.perf_counter()
                skill.generate([text], decoding)
                seconds[i].append(time.perf_counter() - began)
            advance(1)
    return [1000 * statistics.median(own[1:]) for own in seconds]  # the first turn warms up


def interference(setting: Setting, first: Method) -> dict[str, Any]:
    """Ask the skill that was trained first again, after all others: how many answers changed?"""
    ledger, seed = setting.ledger, setting.plan.seeds[0]
    test = setting.rows.test
    places = range(0, len(test), max(1, len(test) // INTERFERENCE_ROWS))[:INTERFERENCE_ROWS]
    asked = [test[place] for place in places]
    skill = setting.frozen.skill(ledger.folder(first.name, seed))
    again = evaluate(skill, asked, setting.rows.templates, decoding=setting.decoding)
    answers = ledger.answers(first.name, seed)
    then = [answers[place] for place in places]
    changed = sum(a != p.prediction for a, p in zip(then, again.predictions, strict=True))
    return {"asked": len(asked), "changed": changed}


def once(
    ledger: Ledger, stage: str, method: str, seed: int, measure: Callable[[], dict[str, Any]]
) -> None:
    """Note a measurement, if it is not there yet."""
    key = {"stage": stage, "method": method, "seed": seed}
    if ledger.find(**key) is None:
        ledger.add({**key, **measure()})
