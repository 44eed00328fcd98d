"""Measuring one process: seconds, rates, percentiles, bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

WARM = 3  # searches that are not counted: they read what the first search needs


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Yield a dictionary that afterwards holds the seconds of the block."""
    clock, processor = time.perf_counter(), time.process_time()
    facts: dict[str, float] = {}
    yield facts
    facts["seconds"] = time.perf_counter() - clock
    facts["cpu_seconds"] = time.process_time() - processor


def rated(facts: dict[str, float], count: int, size: int) -> dict[str, float]:
    """Return the rates of a build."""
    return {
        "passages": count,
        "passages_per_second": count / facts["seconds"],
        "bytes": size,
        "bytes_per_passage": size / count,
    }


def searched(
    search: Callable[[str], list[str]], asked: Sequence[str], seconds: float
) -> tuple[list[list[str]], dict[str, Any]]:
    """Search one question at a time until all are done or `seconds` are up."""
    for question in asked[:WARM]:
        search(question)
    found, spent = [], []
    began, processor = time.perf_counter(), time.process_time()
    for question in asked[WARM:]:
        start = time.perf_counter()
        found.append(search(question))
        spent.append(time.perf_counter() - start)
        if start - began > seconds:
            break
    used = time.process_time() - processor
    p50, p95, p99 = np.percentile(spent, (50, 95, 99))
    return found, {
        "queries": len(spent),
        "queries_per_second": len(spent) / sum(spent),
        "queries_per_cpu_second": len(spent) / max(used, 1e-9),
        "milliseconds": {"p50": 1e3 * p50, "p95": 1e3 * p95, "p99": 1e3 * p99},
    }


def bytes_of(path: Path) -> int:
    """Return the size of a file or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(f.stat().st_size for f in files if f.is_file())
