"""`shoulders bench generate`: our generation and transformers' on the same rows, by turns."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shoulders.benchmark.contender import Contender, by_turns, median, peer_lm, write_rows
from shoulders.benchmark.limits import LIMIT, floating, limit_of, limits
from shoulders.benchmark.worker import INIT
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.prompts.initial import InitConfig, initial_ids
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill

PEER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class GenerateBenchmark:
    """What to measure.

    `peers` is the folder with the peers' scripts, or None for ours alone; `vllm` is the Python
    interpreter of an environment with vLLM, or None to leave it out.
    """

    lm: str
    dtypes: Sequence[str]
    kinds: Sequence[str]
    length: int
    new_tokens: int
    batch: int
    runs: int
    peers: Path | None
    vllm: Path | None = None


def bench_generate(
    settings: GenerateBenchmark, rows: Sequence[dict[str, str]], console: Console
) -> dict[str, Any]:
    """Measure every contender by turns and return the figures, medians over runs.

    The figures at the top are those of the first kind in the first dtype. `same_tokens` is the
    share of rows whose greedy tokens equal those of transformers in float32, where the prompt is
    the one that it was given, too (kind `static`).

    Raises:
        ShouldersError: a contender failed.
    """
    lm = load_lm(settings.lm, dtype="float32")
    ids = Skill(lm, SkillConfig()).input_ids([row["input"] for row in rows])
    random = torch.Generator().manual_seed(0)
    prompt = initial_ids(InitConfig.model_validate(INIT), lm, settings.length, random).tolist()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, [{**row, "ids": own} for row, own in zip(rows, ids, strict=True)])
        measured = [limit_of(settings.lm), *contenders(settings, file, prompt)]
        results = by_turns(measured, settings.runs, console)
    limit = limits(results.pop(LIMIT))
    fastest = floating(limit["limit_operations_per_s"])
    methods: dict[str, Any] = {}
    for name, runs in results.items():
        seconds = median(runs, "seconds")
        methods[name] = {
            "new_tokens_per_s": runs[0]["new_tokens"] / seconds,
            "rows_per_s": runs[0]["rows"] / seconds,
            "seconds": [run["seconds"] for run in runs],
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        }
        if "operations" in runs[0]:
            methods[name]["share_of_limit"] = runs[0]["operations"] / seconds / fastest
    if settings.peers is not None:
        _compare(methods, {name: runs[0]["token_ids"] for name, runs in results.items()})
    first = f"{settings.kinds[0]} {settings.dtypes[0]}"
    return {
        "benchmark": "generate",
        "new_tokens_per_s": methods[first]["new_tokens_per_s"],
        "share_of_limit": methods[first]["share_of_limit"],
        "ratios": methods[first].get("ratios", {}),
        "headline": first,
        **limit,
        "methods": methods,
        "rows": len(rows),
        "new_tokens": settings.new_tokens,
        "peer_batch": settings.batch,
        "length": settings.length,
        "runs": len(limit["limit_samples"]["float32"]),
        "lm": settings.lm,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def contenders(settings: GenerateBenchmark, rows: Path, prompt: Sequence[int]) -> list[Contender]:
    """Return ours, every kind in every dtype, and transformers in both of its."""
    shared = ["--rows", str(rows), "--new-tokens", str(settings.new_tokens)]
    worker = [sys.executable, "-m", "shoulders.benchmark.generate_worker", "--lm", settings.lm]
    worker += ["--length", str(settings.length), *shared]
    found = [
        Contender(f"{kind} {dtype}", [*worker, "--dtype", dtype, "--kind", kind])
        for dtype in settings.dtypes
        for kind in settings.kinds
    ]
    if settings.peers is not None:
        asked = ["--lm", peer_lm(settings.lm), *shared]
        asked += ["--prompt-ids", ",".join(map(str, prompt))]
        script = [sys.executable, str(settings.peers / "hf_generate.py"), *asked]
        script += ["--batch", str(settings.batch)]
        found += [Contender(f"hf_{d}", [*script, "--dtype", d]) for d in PEER_DTYPES]
        if settings.vllm is not None:
            script = [str(settings.vllm), str(settings.peers / "vllm_generate.py"), *asked]
            found += [Contender(f"vllm_{d}", [*script, "--dtype", d]) for d in PEER_DTYPES]
    return found


def _compare(methods: dict[str, Any], tokens: dict[str, list[list[int]]]) -> None:
    """Add ratios to the peers' speed, and how many rows got the same tokens."""
    speed = {name: entry["new_tokens_per_s"] for name, entry in methods.items()}
    peers = {name: value for name, value in speed.items() if name.startswith(("hf_", "vllm_"))}
    for family in ("hf", "vllm"):
        members = [value for name, value in peers.items() if name.startswith(family)]
        peers |= {f"{family}_best": max(members)} if members else {}
    theirs = tokens["hf_float32"]
    for name, entry in methods.items():
        if name not in peers:
            entry["ratios"] = {peer: speed[name] / value for peer, value in peers.items()}
        if name in peers or name.startswith("static "):
            same = sum(a == b for a, b in zip(tokens[name], theirs, strict=True))
            entry["same_tokens"] = same / len(theirs)
