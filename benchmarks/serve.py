"""Serving many skills at once, beside transformers + PEFT with one adapter active at a time.

    .venv/bin/python benchmarks/serve.py [--vllm PYTHON]

64 requests at the same moment over 8 skills of 4 kinds (untrained: cost does not depend on values),
64 new tokens each, through the engine; PEFT generates the same rows adapter by adapter, each in one
batch. Also the latency of one request with a static and an input-dependent prompt, of a text that
no cache has seen. Runs by turns, medians. With the Python of an environment that holds vLLM, the
bare LM there with as many tokens (rows behind `LENGTH` more), started once, after all others.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shoulders.benchmark.contender import peer_lm, write_rows
from shoulders.cli.rows import spread
from shoulders.data.rows import read_rows
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.files import write_json
from shoulders.lm.decode import DecodingConfig, Delta
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.serving.engine import Engine
from shoulders.serving.job import Job
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill

ROOT = Path(__file__).parents[1]
KINDS = ("static", "idpt", "static_kv", "idpt_kv")
REQUESTS, SKILLS, LENGTH = 64, 8, 10
LATENCY_TURNS = 4  # of each kind in each run


def main() -> None:
    """Measure by turns and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/multitask")
    parser.add_argument("--dtypes", nargs="+", default=["int8", "float32"])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--latency", action="store_true", help="of single requests alone")
    parser.add_argument("--vllm", type=Path, help="Python of an environment that holds vLLM")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/serve.json")
    options = parser.parse_args()

    templates = Templates.read(ROOT / "recipes/templates/multitask.yaml")
    rows = spread(read_rows(options.data / "validation.jsonl"), REQUESTS)
    texts = [templates.render(row, 0) for row in rows]
    seconds: dict[str, list[float]] = {}
    latency: dict[str, list[float]] = {}
    fill: dict[str, list[float]] = {}
    ours = {dtype: Ours(dtype, options.new_tokens) for dtype in options.dtypes}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        skill = next(iter(ours.values())).skills[0]
        ids = skill.input_ids(texts)
        write_rows(file, [{"ids": own, "adapter": i % SKILLS} for i, own in enumerate(ids)])
        for own in ours.values():
            own.all(texts[:SKILLS])  # to warm up
        for run in range(options.runs):
            for dtype, own in ours.items():
                if not options.latency:
                    before = own.engine.tokens, own.engine.steps
                    seconds.setdefault(dtype, []).append(own.all(texts))
                    rows = own.engine.tokens - before[0]
                    fill.setdefault(dtype, []).append(rows / (own.engine.steps - before[1]))
                for turn in range(LATENCY_TURNS):
                    text = f"({run}.{turn}) {texts[0]}"
                    kinds = ("static", "idpt") if turn % 2 else ("idpt", "static")
                    for kind in kinds:
                        latency.setdefault(f"{kind} {dtype}", []).append(own.one(kind, text))
            if not options.latency:
                seconds.setdefault("peft", []).append(peft(file, options.new_tokens))
        for own in ours.values():
            own.engine.close(10)
        for dtype in ("float32", "bfloat16") if options.vllm else ():
            again = vllm(options.vllm, file, options.new_tokens, dtype, options.runs)
            seconds[f"vllm_{dtype}"] = again
    tokens = REQUESTS * options.new_tokens
    speed = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    waits = {name: statistics.median(values) for name, values in latency.items()}
    result = {
        "benchmark": "serve",
        "requests": REQUESTS,
        "skills": SKILLS,
        "new_tokens": options.new_tokens,
        "tokens_per_s": speed,
        "ratios": {
            f"{dtype} / {peer}": speed[dtype] / speed[peer]
            for dtype in options.dtypes
            if dtype in speed
            for peer in speed
            if peer not in options.dtypes
        },
        "latency_seconds": waits,
        "every_latency": latency,
        "idpt_adds": {d: added(latency[f"idpt {d}"], latency[f"static {d}"]) for d in ours},
        "batch_fill": {name: statistics.median(values) for name, values in fill.items()},
        "seconds": seconds,
        "machine": machine(),
        "seed": 0,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(options.out, result)
    shown = ("tokens_per_s", "ratios", "latency_seconds", "idpt_adds", "batch_fill")
    print(json.dumps({k: result[k] for k in shown}, indent=1))


class Ours:
    """The engine with eight skills, in one precision."""

    def __init__(self, dtype: Any, new_tokens: int) -> None:
        lm = load_lm("embedded", dtype=dtype)
        self.skills = [
            Skill.create(
                lm,
                SkillConfig.model_validate({"passes": [{"prompt": prompt_of(KINDS[i % 4])}]}),
                functools.partial(load_encoder, on_disk=False),  # as served
                torch.Generator().manual_seed(i),
            )
            for i in range(SKILLS)
        ]
        self.engine = Engine(lm)
        self.decoding = DecodingConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens)

    def all(self, texts: Sequence[str]) -> float:
        """Return the seconds for all texts at once, skills by turns."""
        return self.ask([(self.skills[i % SKILLS], text) for i, text in enumerate(texts)])

    def one(self, kind: str, text: str) -> float:
        """Return the seconds for one request alone."""
        return self.ask([(self.skills[KINDS.index(kind)], text)])

    def ask(self, requests: Sequence[tuple[Skill, str]]) -> float:
        """Submit requests at once and wait for all of them."""
        left = threading.Semaphore(0)
        errors: list[Exception] = []

        def tell(event: Delta | Exception) -> None:
            if isinstance(event, Exception):
                errors.append(event)
            if isinstance(event, Exception) or event.completion is not None:
                left.release()

        started = time.perf_counter()
        for skill, text in requests:
            self.engine.submit(Job("s", skill, text, self.decoding, tell))
        for _ in requests:
            left.acquire()
        if errors:
            raise errors[0]
        return time.perf_counter() - started


def added(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Return by how much of `base` the other takes longer, turn by turn: median and quartiles."""
    ratios = [a / b - 1 for a, b in zip(seconds, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": middle, "low": low, "high": high}


def prompt_of(kind: str) -> dict[str, Any]:
    """Return a producer's settings."""
    init = {"source": "text", "text": "Read the instruction and give only the short answer."}
    return {"kind": kind, "length": LENGTH, "init": init}


def peft(rows: Path, new_tokens: int) -> float:
    """Return PEFT's seconds, in a process of its own."""
    command = [sys.executable, str(ROOT / "comparisons/peft_serve.py"), "--lm",
               peer_lm("embedded"), "--rows", str(rows), "--new-tokens", str(new_tokens),
               "--length", str(LENGTH)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds: float = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return seconds


def vllm(python: Path, rows: Path, new_tokens: int, dtype: str, runs: int) -> list[float]:
    """Return vLLM's seconds for the bare LM with as many tokens, in one process of its own."""
    before = ",".join(["1"] * LENGTH)
    command = [str(python), str(ROOT / "comparisons/vllm_generate.py"), "--lm",
               peer_lm("embedded"), "--rows", str(rows), "--new-tokens", str(new_tokens), "--ids",
               "--prompt-ids", before, "--dtype", dtype, "--repeat", str(runs)]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])["every"]
    return seconds


if __name__ == "__main__":
    main()
