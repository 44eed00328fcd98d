"""`shoulders bench train`: our training step, the machine's limit, and PEFT's on the same rows."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.benchmark.contender import Contender, by_turns, median, peer_lm, write_rows
from shoulders.benchmark.limits import LIMIT, floating, limit_of, limits
from shoulders.machine import machine

KINDS = ("static", "idpt", "static_kv", "idpt_kv")
# Peers by name, and what their script is told: PEFT prompt tuning as documented, its better
# settings, and LoRA in either precision.
PEERS = {
    "default": ["--variant", "default"],
    "grouped": ["--variant", "grouped"],
    "bf16": ["--variant", "bf16"],
    "lora": ["--variant", "lora"],
    "lora_bf16": ["--variant", "lora", "--dtype", "bfloat16"],
}


@dataclass(frozen=True, slots=True)
class TrainBenchmark:
    """What to measure; `peers` is the folder with `peft_train.py`, or None for ours alone."""

    lm: str
    dtypes: Sequence[str]
    kinds: Sequence[str]
    rows_per_step: int
    length: int
    runs: int
    peers: Path | None


def bench_train(
    settings: TrainBenchmark, rows: Sequence[dict[str, str]], console: Console
) -> dict[str, Any]:
    """Measure every contender by turns and return the figures, medians over runs.

    Of those with an encoder, speeds are those of rows that it has read before: its outputs are
    kept on disk. `real_tokens_per_s_at_first` has what reading them takes.
    `real_tokens_per_s`, `share_of_limit` and `ratios` at the top are those of the slowest of the
    vector kinds (static, idpt) that were run, or of all kinds where neither was, in the first
    dtype.

    Args:
        settings: what to measure.
        rows: `input`, `text` (input with its separator) and `answer` of each row.
        console: for progress.

    Raises:
        ShouldersError: a contender failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows)
        measured = [limit_of(settings.lm), *contenders(settings, file)]
        results = by_turns(measured, settings.runs, console)
    limit = limits(results.pop(LIMIT))
    rates = limit["limit_operations_per_s"]
    real = float(results[_ours(settings.dtypes[0], settings.kinds[0])][0]["real_tokens"])
    methods = {}
    for name, runs in results.items():
        seconds = median(runs, "seconds")
        entry = {
            "real_tokens_per_s": real / seconds,
            "rows_per_s": len(rows) / seconds,
            "seconds": [run["seconds"] for run in runs],
            "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            "trained_parameters": runs[0]["trained_parameters"],
            "losses": runs[0]["losses"],
        }
        if "operations" in runs[0]:
            entry["positions_per_s"] = runs[0]["positions"] / seconds
            entry["operations_per_s"] = runs[0]["operations"] / seconds
            entry["share_of_limit"] = entry["operations_per_s"] / floating(rates)
            entry["share_of_rates"] = {k: entry["operations_per_s"] / r for k, r in rates.items()}
        if "encoding_seconds" in runs[0]:
            entry["encoding_seconds"] = median(runs, "encoding_seconds")
            at_first = seconds + entry["encoding_seconds"]
            entry["real_tokens_per_s_at_first"] = real / at_first
        methods[name] = entry
    return summary(settings, methods, limit, len(rows))


def contenders(settings: TrainBenchmark, rows: Path) -> list[Contender]:
    """Return ours, every kind in every dtype, and the peers."""
    shared = ["--rows", str(rows), "--length", str(settings.length)]
    shared += ["--rows-per-step", str(settings.rows_per_step)]
    worker = [sys.executable, "-m", "shoulders.benchmark.train_worker", "--lm", settings.lm]
    found = [
        Contender(_ours(dtype, kind), [*worker, "--dtype", dtype, "--kind", kind, *shared])
        for dtype in settings.dtypes
        for kind in settings.kinds
    ]
    if settings.peers is not None:
        script = [sys.executable, str(settings.peers / "peft_train.py")]
        script += ["--lm", peer_lm(settings.lm), *shared]
        found += [Contender(f"peft_{peer}", [*script, *told]) for peer, told in PEERS.items()]
    return found


def summary(
    settings: TrainBenchmark, methods: dict[str, Any], limit: dict[str, Any], rows: int
) -> dict[str, Any]:
    """Return a run's result: every method, the headline's figures at the top."""
    vectors = [kind for kind in settings.kinds if kind in ("static", "idpt")]
    mine = [_ours(settings.dtypes[0], kind) for kind in vectors or settings.kinds]
    slowest = min(mine, key=lambda name: methods[name]["real_tokens_per_s"])
    speed = {name: entry["real_tokens_per_s"] for name, entry in methods.items()}
    peers = {}
    if settings.peers is not None:
        peers = {
            "peft_default": speed["peft_default"],
            "peft_best": max(speed[f"peft_{one}"] for one in ("default", "grouped", "bf16")),
            "peft_best_bf16": speed["peft_bf16"],
            "lora": max(speed["peft_lora"], speed["peft_lora_bf16"]),
        }
    for name in (n for n in methods if not n.startswith("peft_")):
        methods[name]["ratios"] = {peer: speed[name] / value for peer, value in peers.items()}
    return {
        "benchmark": "train",
        "real_tokens_per_s": speed[slowest],
        "share_of_limit": methods[slowest]["share_of_limit"],
        "ratios": methods[slowest]["ratios"],
        "headline": slowest,
        **limit,
        "methods": methods,
        "rows": rows,
        "rows_per_step": settings.rows_per_step,
        "length": settings.length,
        "runs": len(limit["limit_samples"]["float32"]),
        "lm": settings.lm,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ours(dtype: str, kind: str) -> str:
    return f"{kind} {dtype}"
