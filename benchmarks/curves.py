"""Equal loss after equal examples: our training and PEFT's on the same rows, drawn together.

    .venv/bin/python benchmarks/curves.py --runs runs/curves

The static prompt of `recipes/multitask_static.yaml`, in int8 and float32, beside PEFT's prompt
tuning through transformers' Trainer (float32, padded batches): same first prompt, rows, order,
optimizer and schedule. Ours trains the prompt in standard deviations of the LM's embeddings, so
PEFT's rate and largest gradient norm are put into its units. The input-dependent prompt's curve
stands beside them. Finished runs are kept. Speed is measured elsewhere (`shoulders bench train`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from shoulders.benchmark.contender import peer_lm, write_rows
from shoulders.data.mixture import Mixture
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.prompts.initial import InitConfig, initial_ids
from shoulders.skills.skill import Skill
from shoulders.training.examples import example_at
from shoulders.training.recipe import Recipe, read_recipe
from shoulders.training.run import load_data

ROOT = Path(__file__).parents[1]
SHOULDERS = Path(sys.executable).parent / "shoulders"
OURS = (("static", "float32"), ("static", "int8"), ("idpt", "int8"))
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
            name: sum(losses[-(options.steps // 4) :]) / (options.steps // 4)
            for name, losses in curves.items()
        },
        "machine": machine(),
        "seed": 0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(curves, options.out.with_suffix(".png"))
    for name, loss in result["last_quarter"].items():
        print(f"{name:20} {loss:.3f}")


def ours(kind: str, dtype: str, options: argparse.Namespace) -> list[float]:
    """Train a recipe for so many steps through the command line; return every step's loss."""
    folder = options.runs / f"{kind}-{dtype}-{options.steps}"
    if not (folder / "skill.json").is_file():
        values = [f"training.steps={options.steps}", f"lm.dtype={dtype}",
                  "training.validate_every=100000", "training.validation_rows=1"]  # fmt: skip
        sets = [part for value in values for part in ("--set", value)]
        recipe = ROOT / f"recipes/multitask_{kind}.yaml"
        command = [SHOULDERS, "train", recipe, "--out", folder, "--resume", *sets]
        subprocess.run([str(part) for part in command], check=True)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry["loss"] for line in lines if "loss" in (entry := json.loads(line))]


def peft(options: argparse.Namespace) -> list[float]:
    """Train PEFT's prompt on the same rows; return every step's loss."""
    file = options.runs / f"peft-{options.steps}.json"
    if not file.is_file():
        recipe = recipe_of("static")
        lm = load_lm("embedded", dtype="float32")
        spec = recipe.skill.passes[0].prompt
        assert spec is not None
        random = torch.Generator().manual_seed(0)
        init = InitConfig.model_validate(spec["init"])
        first = initial_ids(init, lm, spec["length"], random).tolist()
        training = recipe.training
        rows = options.runs / "rows.jsonl"
        # The tokens that ours reads, in the order in which it does.
        train, _, templates = load_data(recipe.data)
        mixture = Mixture(train, templates, recipe.data, training.seed)
        base = Skill(lm, recipe.skill)
        examples = [
            example_at(base, mixture, i, training.seed)
            for i in range(options.steps * training.rows_per_step)
        ]
        write_rows(rows, [{"ids": e.input_ids, "answer_ids": e.answer_ids} for e in examples])
        command = [
            *(sys.executable, ROOT / "comparisons/peft_train.py", "--lm", peer_lm("embedded")),
            *("--rows", rows, "--variant", "default", "--length", spec["length"]),
            *("--rows-per-step", training.rows_per_step, "--prompt-ids", ",".join(map(str, first))),
            *("--lr", training.optimizer.lr * lm.embedding_scale),
            *("--warmup-steps", training.warmup_steps, "--beta2", training.optimizer.betas[1]),
            *("--clip", training.clip / lm.embedding_scale),
        ]
        done = subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        )
        file.write_text(done.stdout.strip().splitlines()[-1], encoding="utf-8")
    losses: list[float] = json.loads(file.read_text(encoding="utf-8"))["losses"]
    return losses[: options.steps]


def recipe_of(kind: str) -> Recipe:
    """Return a committed recipe."""
    return read_recipe(ROOT / f"recipes/multitask_{kind}.yaml")


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Draw every curve against the examples that were seen."""
    figure, axes = plt.subplots(figsize=(7, 4.5))
    rows = recipe_of("static").training.rows_per_step
    for name, losses in curves.items():
        means = torch.tensor(losses).unfold(0, SMOOTHED, 1).mean(1)
        steps = torch.arange(SMOOTHED, len(losses) + 1)
        style = "k--" if name.startswith("peft") else "-"
        axes.plot(steps * rows, means, style, label=name)
    axes.set(xlabel="examples seen", ylabel=f"training loss, mean of {SMOOTHED} steps")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
