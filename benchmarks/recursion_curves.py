"""Neural recursion against one pass of as many parameters: over steps, rows and the Connector.

    .venv/bin/python benchmarks/recursion_curves.py --runs runs/recursion_curves

Each variant of `recipes/multitask_neural.yaml` (and of its one-pass rival) is 200 steps of 16 rows
without the Connector's pretraining, seed 0, else as in the recipe; what is compared is the loss on
validation rows. Test files are never read. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shoulders.files import atomic_path, write_json, write_text
from shoulders.machine import machine

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SHOULDERS = [sys.executable, "-m", "shoulders"]
STEPS = 200
NEURAL, RIVAL = "multitask_neural", "multitask_neural_matched"
CONNECTOR = "skill.passes.0.link"
START = "Read the instruction and give only the short answer."
WRITTEN = (
    f"{{kind: idpt_kv, length: 10, init: {{source: text, text: {START}}}, "
    "generator: {width: 228, layers: 2, heads: 6}}"
)
GENTLE = (
    "training.optimizer={kind: adamw, lr: 5.0e-3, lr_for: {generator: 2.5e-4, project: 5.0e-5}}"
)
GENTLE_BOTH = (
    "training.optimizer={kind: adamw, lr: 5.0e-3, lr_for: {passes.0.link: 5.0e-4, "
    "passes.1.prompt.generator: 2.5e-4, passes.1.prompt.project: 5.0e-5}}"
)
# name: recipe, settings, rows per task (None: all)
VARIANTS: dict[str, tuple[str, list[str], int | None]] = {
    "one pass": (RIVAL, [], None),
    "two passes": (NEURAL, [], None),
    "one pass, 16 rows a task": (RIVAL, [], 16),
    "two passes, 16 rows a task": (NEURAL, [], 16),
    "one pass, 128 rows a task": (RIVAL, [], 128),
    "two passes, 128 rows a task": (NEURAL, [], 128),
    "Connector 1 x 192": (NEURAL, [f"{CONNECTOR}.layers=1", f"{CONNECTOR}.width=192"], None),
    "Connector 4 x 576": (
        NEURAL,
        [f"{CONNECTOR}.layers=4", f"{CONNECTOR}.width=576", f"{CONNECTOR}.heads=9"],
        None,
    ),
    # A warm start: 200 further steps on other rows from the trained "one pass", with and without a
    # Connector that begins at nothing.
    "one pass, on from one": (RIVAL, ["start={passes.0.prompt: ONE PASS}", GENTLE], None),
    "two passes, on from one": (
        NEURAL,
        ["start={passes.1.prompt: ONE PASS}", f"skill.passes.1.prompt={WRITTEN}", GENTLE_BOTH],
        None,
    ),
    "Connector's rate x 4": (NEURAL, ["training.optimizer.lr_for={passes.0.link: 2.0e-3}"], None),
}

SIZES = ("Connector 1 x 192", "two passes", "Connector 4 x 576")


def main() -> None:
    """Run what is not there yet, then collect and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recursion_curves")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/multitask")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/recursion_curves.json"
    )
    options = parser.parse_args()
    results = [variant(name, options) for name in options.variants]
    write_json(
        options.out,
        {
            "benchmark": "recursion curves",
            "steps": STEPS,
            "split": "validation",
            "results": results,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    draw(results, options.out.with_suffix(".png"))
    for r in results:
        print(f"{r['variant']:28} {r['trained_parameters']:>10,} {r['rows']:>6} "
              f"{r['curve'][-1][1]:.3f}")  # fmt: skip


def variant(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train one variant through the command line, unless it is there; return its curve."""
    recipe, settings, per_task = VARIANTS[name]
    folder = options.runs / name.replace(" ", "_").replace(",", "").replace("'", "")
    train, validation = options.data / "train.jsonl", options.data / "validation.jsonl"
    rows = train if per_task is None else few(train, per_task, options.runs)
    # Fewer training rows must not change which validation rows are new to all of them.
    judged = options.runs.resolve() / "validation.jsonl"
    seen = {(row["task"], row["input"]) for row in lines(train)}
    new = [row for row in lines(validation) if (row["task"], row["input"]) not in seen]
    write_text(judged, "".join(json.dumps(row) + "\n" for row in new))
    first = options.runs.resolve() / "one_pass"
    if not (folder / "skill.json").is_file():
        values = [
            f"training.steps={STEPS}",
            "training.validate_every=50",
            f"data.train=[{rows}]",
            f"data.validation=[{judged}]",
            "start={}",
            *(setting.replace("ONE PASS", str(first)) for setting in settings),
            *(["training.seed=1"] if any("ONE PASS" in setting for setting in settings) else []),
        ]
        sets = [part for value in values for part in ("--set", value)]
        command = [*SHOULDERS, "train", ROOT / f"recipes/{recipe}.yaml", "--out", folder]
        subprocess.run([str(c) for c in [*command, "--resume", *sets]], check=True)
    skill = json.loads((folder / "skill.json").read_text(encoding="utf-8"))
    facts = skill["provenance"]
    return {
        "variant": name,
        "recipe": recipe,
        "settings": settings,
        "rows": sum(1 for _ in rows.open(encoding="utf-8")),
        "rows_per_task": per_task,
        "trained_parameters": skill["trained_parameters"],
        "curve": [(v["step"], v["loss"]) for v in facts["validations"]],
        "training_seconds": facts["training_seconds"],
        "seed": facts["recipe"]["training"]["seed"],
    }


def few(train: Path, per_task: int, runs: Path) -> Path:
    """Write the first rows of every task into a file of their own."""
    kept: dict[str, list[str]] = defaultdict(list)
    for row in lines(train):
        if len(kept[row["task"]]) < per_task:
            kept[row["task"]].append(json.dumps(row) + "\n")
    file = (runs / f"train-{per_task}.jsonl").resolve()
    write_text(file, "".join(line for own in kept.values() for line in own))
    return file


def lines(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file as they stand there."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw loss against steps, rows and trained parameters."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    over_steps, over_rows, over_size = figure.subplots(1, 3, sharey=True)
    by_name = {r["variant"]: r for r in results}
    for name in ("one pass", "two passes", "Connector's rate x 4"):
        if name in by_name:
            over_steps.plot(*zip(*by_name[name]["curve"], strict=True), marker="o", label=name)
    for name in ("one pass, on from one", "two passes, on from one"):
        if name in by_name:  # after the steps of what they go on from
            points = [(STEPS + step, loss) for step, loss in by_name[name]["curve"]]
            over_steps.plot(*zip(*points, strict=True), "--", marker="o", label=name)
    over_steps.set(xlabel="steps of 16 rows", ylabel="validation loss, nats")
    over_steps.legend()
    for form in ("one pass", "two passes"):
        own = [r for r in results if r["variant"] == form or r["variant"].startswith(f"{form}, ")]
        own = [r for r in own if not r["variant"].endswith("on from one")]
        points = sorted((r["rows"], r["curve"][-1][1]) for r in own)
        over_rows.plot(*zip(*points, strict=True), marker="o", label=form)
    over_rows.set(xlabel="training rows", xscale="log")
    over_rows.legend()
    sizes = [
        r
        for r in results
        if r["variant"] in ("two passes", "Connector 1 x 192", "Connector 4 x 576")
    ]
    points = sorted((r["trained_parameters"], r["curve"][-1][1]) for r in sizes)
    over_size.plot(*zip(*points, strict=True), marker="o", label="two passes")
    over_size.set(xlabel="trained parameters", xscale="log")
    over_size.legend()
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    main()
