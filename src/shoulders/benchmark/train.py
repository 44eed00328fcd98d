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
from shoulders.benchmark.limits import matmul_rates
from shoulders.machine import machine

KINDS = ("static", "idpt", "static_kv", "idpt_kv")
# Peers by name: PEFT prompt tuning as documented, its better settings, and LoRA.
PEERS = ("default", "grouped", "bf16", "lora")


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
    rates = matmul_rates(settings.lm)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, rows)
        results = by_turns(contenders(settings, file), settings.runs, console)
    real = float(results[_ours(settings.dtypes[0], settings.kinds[0])][0]["real_tokens"])
    fastest_limit = max(rates["float32"], rates["bfloat16"])
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
            entry["share_of_limit"] = entry["operations_per_s"] / fastest_limit
            entry["share_of_rates"] = {k: entry["operations_per_s"] / r for k, r in rates.items()}
        methods[name] = entry
    return _summary(settings, methods, rates, len(rows))


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
        found += [Contender(f"peft_{peer}", [*script, "--variant", peer]) for peer in PEERS]
    return found


def _summary(
    settings: TrainBenchmark, methods: dict[str, Any], rates: dict[str, float], rows: int
) -> dict[str, Any]:
    vectors = [kind for kind in settings.kinds if kind in ("static", "idpt")]
    mine = [_ours(settings.dtypes[0], kind) for kind in vectors or settings.kinds]
    slowest = min(mine, key=lambda name: methods[name]["real_tokens_per_s"])
    speed = {name: entry["real_tokens_per_s"] for name, entry in methods.items()}
    peers = {}
    if settings.peers is not None:
        peers = {
            "peft_default": speed["peft_default"],
            "peft_best": max(speed["peft_grouped"], speed["peft_bf16"]),
            "peft_best_bf16": speed["peft_bf16"],
            "lora": speed["peft_lora"],
        }
    for name in (n for n in methods if not n.startswith("peft_")):
        methods[name]["ratios"] = {peer: speed[name] / value for peer, value in peers.items()}
    return {
        "benchmark": "train",
        "real_tokens_per_s": speed[slowest],
        "share_of_limit": methods[slowest]["share_of_limit"],
        "ratios": methods[slowest]["ratios"],
        "headline": slowest,
        "limit_operations_per_s": rates,
        "methods": methods,
        "rows": rows,
        "rows_per_step": settings.rows_per_step,
        "length": settings.length,
        "runs": settings.runs,
        "lm": settings.lm,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ours(dtype: str, kind: str) -> str:
    return f"{kind} {dtype}"
