"""Closed-book questions: what the frozen LM knows, asked through prompts and recursion.

    .venv/bin/python benchmarks/closed_book.py --connector runs/connector

Trains recipes/nq_closed_book.yaml in several forms at equal steps, scores them on the test
questions and writes one JSON. Every figure comes from `shoulders train` and `shoulders eval`.
Finished parts are kept, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from shoulders.files import write_json
from shoulders.machine import machine

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/nq_closed_book.yaml"
INIT = {"source": "text", "text": "Answer the question with a short answer."}
FORMS = ("static", "static_kv", "idpt", "idpt_kv", "textual", "neural")
# Rates of the four producers as in recipes/multitask_*.yaml, tuned there (benchmarks/tune.py).
RATES: dict[str, dict[str, Any]] = {
    "static": {"lr": 0.3},
    "static_kv": {"lr": 3e-2},
    "idpt": {"lr": 1.0, "lr_for": {"generator": 1.5e-3, "project": 1.5e-3}},
    "idpt_kv": {"lr": 1e-2, "lr_for": {"generator": 5e-4, "project": 1e-4}},
    "textual": {"lr": 3e-3, "lr_for": {"generator": 3e-4, "project": 5e-5}},
    "neural": {"lr": 3e-2, "lr_for": {"passes.0.link": 5e-4}},
}


def main() -> None:
    """Run what is not there yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/nq")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/closed_book")
    parser.add_argument("--connector", type=Path, required=True, help="of recipes/connector.yaml")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nq_closed_book.json")
    options = parser.parse_args()

    results = [{"method": "base", "trained_parameters": 0, **scored("base", options, "base")}]
    for form in options.forms:
        folder = options.runs / f"{form}-{options.steps}"
        if not (folder / "skill.json").is_file():
            settings = [f"training.steps={options.steps}", *overrides(form, options)]
            sets = [part for one in settings for part in ("--set", one)]
            shoulders("train", RECIPE, "--out", folder, "--resume", *sets)
        artefact = json.loads((folder / "skill.json").read_text(encoding="utf-8"))
        facts = {"method": form, "trained_parameters": artefact["trained_parameters"]}
        results.append({**facts, **scored(str(folder), options, folder.name)})
    write_json(
        options.out,
        {
            "benchmark": "closed-book questions",
            "split": "test",
            "steps": options.steps,
            "seed": 0,
            "results": results,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    for r in results:
        low, high = r["ci95"]
        print(f"{r['method']:10} {r['exact_match']:5.1f} [{low:.1f}, {high:.1f}]  F1 {r['f1']:.1f}")


def overrides(form: str, options: argparse.Namespace) -> list[str]:
    """Return what a form changes in the recipe."""

    def prompt(kind: str) -> dict[str, Any]:
        return {"kind": kind, "length": 10, "init": INIT}

    more: dict[str, Any] = {}
    if form == "textual":
        propose = {"n": 8, "temperature": 0.8, "max_new_tokens": 16}
        passes = [{"prompt": prompt("idpt_kv"), "propose": propose}, {"prompt": prompt("idpt_kv")}]
        first = str(options.runs / "idpt_kv")
        more["start"] = {"passes.0.prompt": first, "passes.1.prompt": first}
        more["cross_fit"] = {"folds": 2, "steps": options.steps // 2, "rows": 1600}
        more["training.steps"] = options.steps // 2
    elif form == "neural":
        link = {"kind": "connector", "layers": 2, "width": 384, "heads": 6}
        passes = [{"link": link}, {"prompt": prompt("static_kv")}]
        more["start"] = {"passes.0.link": str(options.connector.resolve())}
    else:
        passes = [{"prompt": prompt(form)}]
    values = {"skill": {"passes": passes}, "training.optimizer": RATES[form], **more}
    return [f"{key}={yaml.safe_dump(value, default_flow_style=True)}".strip()
            for key, value in values.items()]  # fmt: skip


def scored(skill: str, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return exact match and F1 on the test questions (SQuAD's normalisation)."""
    file = options.runs / f"{name}.json"
    if not file.is_file():
        shoulders("eval", skill, "--data", options.data / "test.jsonl", "--normalizer", "squad",
                  "--json", file)  # fmt: skip
    found = json.loads(file.read_text(encoding="utf-8"))
    return {
        "n": found["n"],
        "exact_match": found["metrics"]["exact_match"],
        "ci95": found["ci95"]["exact_match"],
        "f1": found["metrics"]["f1"],
        "seconds": found["seconds"],
    }


def shoulders(*arguments: object) -> None:
    """Run the command line as a user does."""
    subprocess.run([sys.executable, "-m", "shoulders", *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
