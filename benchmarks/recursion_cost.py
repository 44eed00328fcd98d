"""What a second pass costs: generation at one and two passes, and training with a kept first pass.

    .venv/bin/python benchmarks/recursion_cost.py

Untrained networks (cost does not depend on values), the embedded LM, rows of the 24-task suite;
runs by turns in one process, medians. The Connector starts at nothing: both generate the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shoulders.data.rows import read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.lm.streams import Streams
from shoulders.machine import machine
from shoulders.recursion.first_pass import FirstPass
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.examples import example_of
from shoulders.training.step import gradients

ROOT = Path(__file__).parents[1]
PREFIX = {"kind": "static_kv", "length": 10}
LINK = {"kind": "connector", "layers": 2, "width": 384, "heads": 6}


def main() -> None:
    """Measure by turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/multitask")
    parser.add_argument("--dtype", default="int8", choices=("int8", "float32"))
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/recursion_cost.json")
    options = parser.parse_args()

    templates = Templates.read(ROOT / "recipes/templates/multitask.yaml")
    rows = read_rows(options.data / "validation.jsonl")[: options.rows]
    texts = [templates.render(row, 0) for row in rows]
    lm = load_lm("embedded", dtype=options.dtype)
    one = skill_of(lm, [{"prompt": PREFIX}])
    two = skill_of(lm, [{"link": LINK}, {"prompt": PREFIX}])
    new = options.new_tokens
    decoding = DecodingConfig(max_new_tokens=new, min_new_tokens=new)
    examples = [example_of(one, row, text, 0) for row, text in zip(rows, texts, strict=True)][:16]
    config = TrainingConfig(steps=1, optimizer=OptimizerConfig(lr=1e-3))
    with tempfile.TemporaryDirectory() as folder, Streams.of(lm) as streams:
        kept = two.remembering(FirstPass(lm, (), Path(folder)))
        contenders: dict[str, Callable[[], Any]] = {
            "generate, one pass": lambda: one.generate(texts, decoding),
            "generate, two passes": lambda: two.generate(texts, decoding),
            "step, one pass": lambda: gradients(one, examples, config, streams),
            "step, two passes": lambda: gradients(two, examples, config, streams),
            "step, two passes, first one kept": lambda: gradients(kept, examples, config, streams),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for name in contenders:
            contenders[name]()  # to warm up, and to fill the store
        for _ in range(options.runs):
            for name, run in contenders.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {
        "generate, two passes / one": medians["generate, two passes"]
        / medians["generate, one pass"],
        "step, two passes / one": medians["step, two passes"] / medians["step, one pass"],
        "step, first pass kept / not": medians["step, two passes, first one kept"]
        / medians["step, two passes"],
    }
    write_json(
        options.out,
        {
            "benchmark": "recursion_cost",
            "dtype": options.dtype,
            "rows": len(rows),
            "new_tokens": new,
            "seconds": seconds,
            "medians": medians,
            "ratios": ratios,
            "connector_parameters": two.trained_parameters - one.trained_parameters,
            "machine": machine(),
            "seed": 0,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    for name, value in {**medians, **ratios}.items():
        print(f"{name:40} {value:8.2f}")


def skill_of(lm: Any, passes: list[dict[str, Any]]) -> Skill:
    """Return an untrained skill."""
    config = SkillConfig.model_validate({"passes": passes})
    return Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()
