"""What answering together is worth: every member of an ensemble alone, and the first ones together.

    .venv/bin/python benchmarks/ensembles.py runs/compare_9600/runs/static_lowrank_x3_of3-seed0

On validation rows, which no test figure comes from: it says how many members to take before the
test is read. Ensembles that stand in the file already are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.data.rows import read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.evaluation.evaluate import Evaluation, evaluate
from shoulders.evaluation.metrics import paired_interval
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import load_ensemble

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Score what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ensembles", type=Path, nargs="+")
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared/data/multitask/validation.jsonl"
    )
    parser.add_argument("--lm", default="embedded")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ensembles.json")
    options = parser.parse_args()
    noted: dict[str, Any] = {"benchmark": "ensembles", "results": {}}
    if options.out.is_file():
        noted = json.loads(options.out.read_text(encoding="utf-8"))
    lm = load_lm(options.lm, dtype=options.dtype)
    for folder in options.ensembles:
        if folder.name in noted["results"]:
            continue
        ensemble, templates = load_ensemble(folder, lm, functools.cache(load_encoder))
        noted["results"][folder.name] = scored(ensemble, templates, options.data)
        facts = {"data": options.data.name, "machine": machine()}
        noted |= facts | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        write_json(options.out, noted)


def scored(ensemble: Ensemble, templates: Templates, data: Path) -> dict[str, Any]:
    """Return the exact match of every member, and of the first two and more together."""
    rows, console = read_rows(data), Console()
    found: dict[str, Evaluation] = {}
    members = ensemble.members
    for number, one in enumerate(members, 1):
        found[f"member {number}"] = evaluate(one, rows, templates)
    for count in range(2, len(members) + 1):
        found[f"first {count}"] = evaluate(Ensemble(members[:count]), rows, templates)
    for name, one in found.items():
        console.print(f"{name}: {one.metrics['exact_match']:.1f} {one.ci95['exact_match']}")
    whole = by_task(found[f"first {len(members)}"])
    return {
        "n": len(rows),
        "trained_parameters": ensemble.trained_parameters,
        "exact_match": {
            name: {
                "mean": one.metrics["exact_match"],
                "ci95": one.ci95["exact_match"],
                "seconds": round(one.seconds, 1),
            }
            for name, one in found.items()
        },
        "all_against": {
            name: paired_interval(whole, by_task(one))
            for name, one in found.items()
            if name.startswith("member")
        },
    }


def by_task(one: Evaluation) -> dict[str, list[float]]:
    """Return the rows' exact matches, 0 or 1, task by task."""
    found: dict[str, list[float]] = {}
    for row in one.predictions:
        found.setdefault(row.task, []).append(row.exact_match)
    return found


if __name__ == "__main__":
    main()
