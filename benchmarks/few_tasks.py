"""Which tasks a lead rests on: each pair of methods over all tasks, and without those few.

    .venv/bin/python benchmarks/few_tasks.py benchmarks/results/compare_multitask_ensembles.json \\
        --pair static_lowrank_x3_of3,lora_r64 \\
        --pair static_lowrank_spelled_x3_of3,lora_r64_spelled

A comparison's report says it of the best methods alone.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoulders.comparison.summary import Line, difference, lines, rests_on, without
from shoulders.files import write_json
from shoulders.machine import machine

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Write one entry for every pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--pair", action="append", required=True, help="AHEAD,BEHIND")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/few_tasks.json")
    options = parser.parse_args()
    found = lines(json.loads(options.comparison.read_text(encoding="utf-8")))
    by_name = {line.name: line for line in found}
    pairs = [tuple(by_name[name] for name in pair.split(",")) for pair in options.pair]
    write_json(
        options.out,
        {
            "benchmark": "few tasks",
            "comparison": options.comparison.name,
            "pairs": [described(ahead, behind) for ahead, behind in pairs],
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )


def described(ahead: Line, behind: Line) -> dict[str, Any]:
    """Return the pair's difference, the tasks that it rests on, and both methods without them."""
    tasks = rests_on(ahead, behind)
    one, other = without(ahead, tasks), without(behind, tasks)
    return {
        "ahead": ahead.name,
        "behind": behind.name,
        "difference": str(difference(ahead, behind)),
        "tasks": tasks,
        "exact_match_without": {line.name: line.exact_match for line in (one, other)},
        "difference_without": str(difference(one, other)),
    }


if __name__ == "__main__":
    main()
