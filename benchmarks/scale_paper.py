"""What 21 million and a billion passages need, reckoned from `scale.py`'s JSON: docs/scale.md.

    .venv/bin/python benchmarks/scale_paper.py benchmarks/results/scale.json

Bytes and times grow with the number of passages; where something grows otherwise the table says
so. `core` hours are of one core of the measured machine (`cpu_seconds`).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

COUNTS = (1_000_000, 21_000_000, 1_000_000_000)
RAM, DISK, CORES = 128e9, 4e12, 32  # of a machine, where the number of machines is reckoned
WAIT = 0.2  # seconds that a question may take
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "result", type=Path, nargs="?", default=ROOT / "benchmarks/results/scale.json"
    )
    parts = json.loads(parser.parse_args().result.read_text())["parts"]
    print(f"| | {' | '.join(f'{count:,}' for count in COUNTS)} |")
    print("|---|" + "---|" * len(COUNTS))
    for name, cells in rows(parts):
        print(f"| {name} | {' | '.join(cells)} |")


def rows(parts: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the names and cells of all rows whose parts were measured."""
    table: list[tuple[str, list[str]]] = []

    def add(name: str, cell: Any) -> None:
        table.append((name, [cell(count) for count in COUNTS]))

    measured = {name: part for name, part in parts.items() if "failed" not in part}
    if "sparse_build" in measured:
        build = measured["sparse_build"]
        add("sparse: disk", lambda n: amount(n * build["bytes_per_passage"]))
        add("sparse: disk while building", lambda n: amount(2 * n * build["bytes_per_passage"]))
        add("sparse: RAM to build", lambda _: amount(build["peak_rss_without_files"]))
        add("sparse: one core builds", lambda n: hours(n * cost(build)))
    if "sparse_serve" in measured:
        serve = measured["sparse_serve"]
        add("sparse: RAM to serve, its own", lambda _: amount(serve["peak_rss_without_files"]))
        add(
            "sparse: one core answers, if linear",
            lambda n: seconds(
                n / count_of(parts, "sparse_build") / serve["queries_per_cpu_second"]
            ),
        )
    if "encoder" in measured:
        encoder = measured["encoder"]
        add("dense: one core encodes", lambda n: hours(n / encoder["passages_per_cpu_second"]))
    if "vectors" in measured:
        vectors = measured["vectors"]
        add("dense, float16: disk", lambda n: amount(n * vectors["bytes_per_passage"]))
    for name, part in (("exact", "dense_serve"), ("approximate", "approximate_serve")):
        if part in measured:
            add(
                f"dense, {name}: one core answers",
                lambda n, part=part: seconds(
                    n / count_of(parts, "vectors") / measured[part]["queries_per_cpu_second"]
                ),
            )
    if "approximate_build" in measured:
        build_near = measured["approximate_build"]
        add("dense, approximate: RAM", lambda n: amount(n * build_near["bytes_per_passage"]))
        add("dense, approximate: one core builds", lambda n: hours(n * cost(build_near)))
    if "engine_build" in measured:
        engine = measured["engine_build"]
        add("LanceDB, sparse: disk", lambda n: amount(n * engine["bytes_per_passage"]))
        add("LanceDB, sparse: one core loads", lambda n: hours(n * cost(engine)))
    if {"sparse_build", "vectors", "approximate_build"} <= measured.keys():
        add("all: disk", lambda n: amount(n * held(measured)))
    if {"sparse_serve", "approximate_serve"} <= measured.keys():
        add(f"hybrid: cores for {WAIT:g} s a question", lambda n: str(cores(measured, n)))
        add("hybrid: machines", lambda n: str(machines(measured, n)))
    return table


def held(measured: dict[str, Any]) -> float:
    """Return the bytes on disk of a passage: sparse index, vectors and codes."""
    return sum(
        measured[name]["bytes_per_passage"]
        for name in ("sparse_build", "vectors", "approximate_build")
    )


def cores(measured: dict[str, Any], count: int) -> int:
    """Return how many cores answer a question in `WAIT`, sparse and approximate, if both divide."""
    spent = sum(
        1 / measured[f"{name}_serve"]["queries_per_cpu_second"] / count_of(measured, of)
        for name, of in (("sparse", "sparse_build"), ("approximate", "vectors"))
    )
    return math.ceil(count * spent / WAIT)


def machines(measured: dict[str, Any], count: int) -> int:
    """Return how many machines hold everything once, and have the cores.

    Codes stay in three quarters of the memory; the rest is for processes and the files' cache.
    """
    codes = measured["approximate_build"]["bytes_per_passage"]
    needs = (
        count * held(measured) / DISK,
        count * codes / (0.75 * RAM),
        cores(measured, count) / CORES,
    )
    return max(math.ceil(need) for need in needs)


def cost(part: dict[str, Any]) -> float:
    """Return the seconds of one core for a passage."""
    return part["cpu_seconds"] / part["passages"]


def count_of(parts: dict[str, Any], name: str) -> int:
    """Return the number of passages of a part."""
    return parts[name]["passages"]


def amount(size: float) -> str:
    """Return bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def hours(spent: float) -> str:
    """Return seconds for people: minutes, hours or days."""
    if spent < 3600:
        return f"{spent / 60:.2g} min"
    return f"{spent / 3600:.2g} h" if spent < 72 * 3600 else f"{spent / 86400:,.0f} days"


def seconds(spent: float) -> str:
    """Return the time of a question."""
    return f"{1e3 * spent:.3g} ms" if spent < 1 else f"{spent:.3g} s"


if __name__ == "__main__":
    main()
