"""The 24-task suite: train the four producers at equal steps, evaluate, write one JSON.

    .venv/bin/python benchmarks/multitask.py --runs runs/multitask

Every figure comes from the command line a user has (`shoulders train`, `shoulders eval`), each
in a process of its own. Finished parts are kept, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
METHODS = ("static", "idpt", "static_kv", "idpt_kv")
SHOULDERS = Path(sys.executable).parent / "shoulders"
BASE_ROWS = 240  # of each split, for the LM alone: its answers are long, and few are right
# Thirteen to twenty-two training rows each: reported, and averaged without, too.
SMALL_TASKS = ("cause_and_effect", "common_concept", "informal_to_formal")


def main() -> None:
    """Run what is not there yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/multitask")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/multitask")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/multitask.json")
    options = parser.parse_args()

    results: list[dict[str, Any]] = []
    templates = RECIPES / "templates/multitask.yaml"
    base = {"method": "zero-shot", "seed": None, "trained_parameters": 0}
    results.append(base | _evaluated("base", options, options.runs / "base", templates))
    for seed in options.seeds:
        for method in options.methods:
            folder = options.runs / f"{method}-seed{seed}"
            if not (folder / "skill.json").is_file():
                _run("train", RECIPES / f"multitask_{method}.yaml", "--out", folder,
                     "--set", f"training.seed={seed}", "--resume")  # fmt: skip
            artefact = json.loads((folder / "skill.json").read_text(encoding="utf-8"))
            facts = {
                "method": method,
                "seed": seed,
                "trained_parameters": artefact["trained_parameters"],
                "steps": artefact["provenance"]["steps"],
                "training_seconds": artefact["provenance"]["training_seconds"],
                "machine": artefact["provenance"]["machine"],
                "date": artefact["provenance"]["created"],
            }
            results.append(facts | _evaluated(str(folder), options, folder / "eval"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(_markdown(results))


def _markdown(results: list[dict[str, Any]]) -> str:
    """Return the README's table."""
    lines = [
        "| method | trained | training | validation EM | test EM, 95% | test, 21 tasks |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        low, high = r["test"]["ci95"]
        minutes = f"{r['training_seconds'] / 60:.1f} min" if r["seed"] is not None else ""
        lines.append(
            f"| {r['method']} | {r['trained_parameters'] / 1e6:.2f}M | {minutes} "
            f"| {r['validation']['exact_match']:.1f} "
            f"| {r['test']['exact_match']:.1f} [{low:.1f}, {high:.1f}] "
            f"| {r['test']['exact_match_without_small_tasks']:.1f} |"
        )
    return "\n".join(lines)


def _evaluated(
    skill: str, options: argparse.Namespace, folder: Path, templates: Path | None = None
) -> dict[str, Any]:
    collected: dict[str, Any] = {}
    for split in ("validation", "test"):
        file = folder / f"{split}.json"
        if not file.is_file():
            extra = ["--templates", templates, "--limit", BASE_ROWS] if templates else []
            _run("eval", skill, "--data", options.data / f"{split}.jsonl", "--json", file, *extra)
        scores = json.loads(file.read_text(encoding="utf-8"))
        large = [v["exact_match"] for t, v in scores["tasks"].items() if t not in SMALL_TASKS]
        collected[split] = {
            "n": scores["n"],
            "exact_match": scores["metrics"]["exact_match"],
            "ci95": scores["ci95"]["exact_match"],
            "f1": scores["metrics"]["f1"],
            "exact_match_without_small_tasks": sum(large) / len(large),
            "tasks": {task: values["exact_match"] for task, values in scores["tasks"].items()},
            "seconds": scores["seconds"],
        }
    return collected


def _run(*arguments: object) -> None:
    subprocess.run([str(SHOULDERS), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
