"""Which producer learns the most from few examples? Variants on the 24 tasks, judged on validation.

    .venv/bin/python benchmarks/producers.py --runs runs/producers

Each variant is 100 steps of 16 rows in int8, seed 0, all else as in `recipes/multitask_*.yaml`;
what is compared is the loss on validation rows (6 a task: differences below 0.05 mean little). Test
files are never read. Finished runs are kept, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoulders.files import write_json
from shoulders.lm.gguf import embedded_lm
from shoulders.training.run import machine

ROOT = Path(__file__).parents[1]
SHOULDERS = [sys.executable, "-m", "shoulders"]
STEPS = 100
START = "Read the instruction and give only the short answer."
GENERATOR = {"width": 384, "layers": 2, "heads": 6}
STATIC = {"lr": 3e-2}
WRITTEN = {"lr": 2e-2, "lr_for": {"generator": 1e-3, "project": 2e-4}}
BESIDE = {"lr": 3e-2, "lr_for": {"updates": 1e-3}}
BOTH = {"lr": 1e-2, "lr_for": {"prefix.generator": 5e-4, "prefix.project": 1e-4, "updates": 1e-3}}
# name: producer, optimizer
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "static prefix": ({"kind": "static_kv"}, STATIC),
    "static prefix of 40": ({"kind": "static_kv", "length": 40}, STATIC),
    "input-dependent prefix": ({"kind": "idpt_kv", "generator": GENERATOR}, WRITTEN),
    "... of 40": ({"kind": "idpt_kv", "length": 40, "generator": GENERATOR}, WRITTEN),
    "... 4 layers": ({"kind": "idpt_kv", "generator": {**GENERATOR, "layers": 4}}, WRITTEN),
    "... width 768": (
        {"kind": "idpt_kv", "generator": {**GENERATOR, "width": 768, "heads": 12}},
        WRITTEN,
    ),
    "... reads the LM's own states": (
        {"kind": "idpt_kv", "generator": {**GENERATOR, "encoder": "LM"}},
        WRITTEN,
    ),
    "... from a tuned encoder": (
        {"kind": "idpt_kv", "generator": {**GENERATOR, "encoder_prompt": 8}},
        WRITTEN,
    ),
    "low-rank updates, r 64": ({"kind": "static_lowrank"}, BESIDE),
    "... r 16": ({"kind": "static_lowrank", "rank": 16}, BESIDE),
    "... r 236": ({"kind": "static_lowrank", "rank": 236}, BESIDE),
    "... twice the rate": (
        {"kind": "static_lowrank"},
        {"lr": 3e-2, "lr_for": {"updates": 2e-3}},
    ),
    "... with an input-dependent prefix": (
        {"kind": "idpt_lowrank", "generator": GENERATOR},
        BOTH,
    ),
}


def main() -> None:
    """Run what is not there yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/producers")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/producers.json")
    options = parser.parse_args()
    results = [variant(name, options.runs) for name in options.variants]
    write_json(
        options.out,
        {
            "benchmark": "producers",
            "split": "validation",
            "steps": STEPS,
            "results": results,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    for r in results:
        print(f"{r['variant']:36} {r['trained_parameters']:>10,} {r['loss']:.3f} "
              f"{r['training_seconds']:5.0f} s")  # fmt: skip


def variant(name: str, runs: Path) -> dict[str, Any]:
    """Train one variant through the command line, unless it is there; return what came out."""
    given, optimizer = VARIANTS[name]
    prompt = {"length": 10, "init": {"source": "text", "text": START}, **given}
    if prompt.get("generator", {}).get("encoder") == "LM":
        prompt["generator"] = {**prompt["generator"], "encoder": str(embedded_lm())}
    folder = runs / "-".join("".join(c if c.isalnum() else " " for c in name).split())
    if not (folder / "skill.json").is_file():
        values = {
            "skill.passes": json.dumps([{"prompt": prompt}]),
            "training.steps": STEPS,
            "training.warmup_steps": 5,
            "training.validate_every": STEPS // 4,
            "training.optimizer": json.dumps({"kind": "adamw", **optimizer}),
        }
        sets = [part for k, v in values.items() for part in ("--set", f"{k}={v}")]
        recipe = ROOT / "recipes/multitask_static_kv.yaml"
        command = [*SHOULDERS, "train", recipe, "--out", folder, "--resume", *sets]
        subprocess.run([str(part) for part in command], check=True)
    skill = json.loads((folder / "skill.json").read_text(encoding="utf-8"))
    facts = skill["provenance"]
    return {
        "variant": name,
        "prompt": given,
        "optimizer": optimizer,
        "trained_parameters": skill["trained_parameters"],
        "loss": facts["validations"][-1]["loss"],
        "curve": [(v["step"], v["loss"]) for v in facts["validations"]],
        "training_seconds": facts["training_seconds"],
        "seed": facts["recipe"]["training"]["seed"],
    }


if __name__ == "__main__":
    main()
