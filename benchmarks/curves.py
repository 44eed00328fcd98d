"""Equal loss after equal examples: our training and PEFT's on the same rows, drawn together.

    .venv/bin/python benchmarks/curves.py --runs runs/curves

The static prompt of `recipes/multitask_static.yaml`, in int8 and float32, beside PEFT's prompt
tuning through transformers' Trainer (float32, padded batches): same first prompt, rows, order,
optimizer and schedule. Ours trains the prompt in standard deviations of the LM's embeddings, so
PEFT's rate and largest gradient norm are put into its units. The other producers' curves stand
beside them. Finished runs are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from shoulders.benchmark.contender import peer_lm, write_rows
from shoulders.benchmark.rows import benchmark_rows
from shoulders.lm.load import load_lm
from shoulders.prompts.initial import InitConfig, initial_ids
from shoulders.training.recipe import Recipe, read_recipe
from shoulders.training.run import machine

ROOT = Path(__file__).parents[1]
SHOULDERS = Path(sys.executable).parent / "shoulders"
OURS = (("static", "float32"), *((k, "int8") for k in ("static", "idpt", "static_kv", "idpt_kv")))
SMOOTHED = 10  # steps in one point of the drawn curves


def main() -> None:
    """Run what is not there yet, write the curves and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/curves")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/curves.json")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)

    curves = {"peft float32": peft(options)}
    for kind, dtype in OURS:
        curves[f"{kind} {dtype}"] = ours(kind, dtype, options)
    result = {
        "steps": options.steps,
        "rows_per_step": recipe_of("static").training.rows_per_step,
        "curves": curves,
        "last_quarter": {
            name: sum(curve["losses"][-options.steps // 4 :]) / (options.steps // 4)
            for name, curve in curves.items()
        },
        "machine": machine(),
        "seed": 0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(curves, options.out.with_suffix(".png"))
    for name, loss in result["last_quarter"].items():
        print(f"{name:20} {loss:.3f}  {curves[name]['seconds'] / 60:.1f} min")


def ours(kind: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a recipe for so many steps through the command line; return losses and seconds."""
    folder = options.runs / f"{kind}-{dtype}-{options.steps}"
    if not (folder / "skill.json").is_file():
        values = [f"training.steps={options.steps}", f"lm.dtype={dtype}",
                  "training.validate_every=100000", "training.validation_rows=1"]  # fmt: skip
        sets = [part for value in values for part in ("--set", value)]
        recipe = ROOT / f"recipes/multitask_{kind}.yaml"
        command = [SHOULDERS, "train", recipe, "--out", folder, "--resume", *sets]
        subprocess.run([str(part) for part in command], check=True)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]
    artefact = json.loads((folder / "skill.json").read_text(encoding="utf-8"))
    return {"losses": losses, "seconds": artefact["provenance"]["training_seconds"]}


def peft(options: argparse.Namespace) -> dict[str, Any]:
    """Train PEFT's prompt on the same rows; return losses and seconds."""
    file = options.runs / f"peft-{options.steps}.json"
    if not file.is_file():
        recipe = recipe_of("static")
        lm = load_lm("embedded", dtype="float32")
        spec = recipe.skill.passes[0].prompt
        assert spec is not None
        random = torch.Generator().manual_seed(0)
        init = InitConfig.model_validate(spec["init"])
        ids = initial_ids(init, lm, spec["length"], random).tolist()
        training = recipe.training
        rows = options.runs / "rows.jsonl"
        assert recipe.data.templates is not None
        write_rows(
            rows,
            benchmark_rows(
                Path(recipe.data.train[0]),
                Path(recipe.data.templates),
                options.steps * training.rows_per_step,
            ),
        )
        command = [
            *(sys.executable, ROOT / "comparisons/peft_train.py", "--lm", peer_lm("embedded")),
            *("--rows", rows, "--variant", "default", "--length", spec["length"]),
            *("--rows-per-step", training.rows_per_step, "--prompt-ids", ",".join(map(str, ids))),
            *("--lr", training.optimizer.lr * lm.embedding_scale),
            *("--warmup-steps", training.warmup_steps, "--beta2", training.optimizer.betas[1]),
            *("--clip", training.clip / lm.embedding_scale),
        ]
        done = subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        )
        file.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
    figures = json.loads(file.read_text(encoding="utf-8"))
    return {"losses": figures["losses"][: options.steps], "seconds": figures["seconds"]}


def recipe_of(kind: str) -> Recipe:
    """Return a committed recipe."""
    return read_recipe(ROOT / f"recipes/multitask_{kind}.yaml")


def draw(curves: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw every curve against examples, and against minutes."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    rows = recipe_of("static").training.rows_per_step
    for name, curve in curves.items():
        losses = torch.tensor(curve["losses"])
        means = losses.unfold(0, SMOOTHED, 1).mean(1)
        steps = torch.arange(SMOOTHED, len(losses) + 1)
        style = "k--" if name.startswith("peft") else "-"
        left.plot(steps * rows, means, style, label=name)
        right.plot(steps * curve["seconds"] / 60 / len(losses), means, style, label=name)
    left.set(xlabel="examples seen", ylabel=f"training loss, mean of {SMOOTHED} steps")
    right.set(xlabel="minutes of training")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
