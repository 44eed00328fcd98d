"""Figures in the docs: each interval stands in a committed result, rounded as it is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"[+-]?\d+\.\d"
INTERVAL = re.compile(rf"({NUMBER})(?: points)? \[({NUMBER}), ({NUMBER})\]")
# The log tells what was tried, runs that nobody keeps among it; compare.md shows one user's screen.
PAGES = [
    page
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    if page.name not in ("log.md", "compare.md") and INTERVAL.search(page.read_text("utf-8"))
]

SHOWN = {"README.md", "compare_multitask.md", "methods.md", "reader.md", "recursion.md"}

Figure = tuple[float, float, float]


def figures(value: Any) -> Iterator[Figure]:
    """Yield every figure with its interval in a result, in whichever form it has them."""
    if isinstance(value, str):
        yield from (tuple(map(float, found)) for found in INTERVAL.findall(value))
    elif isinstance(value, list):
        if len(value) == 3 and all(isinstance(one, float) for one in value):
            yield tuple(value)
        for one in value:
            yield from figures(one)
    elif isinstance(value, dict):
        yield from _of_dict(value)
        for one in value.values():
            yield from figures(one)


def _of_dict(value: dict[str, Any]) -> Iterator[Figure]:
    spread = value.get("ci95")
    if isinstance(spread, list):
        for one in ("exact_match", "mean", "difference", "points"):
            if isinstance(value.get(one), float):
                yield (value[one], *spread)
    elif isinstance(spread, dict):
        for name, ends in spread.items():
            yield (value["metrics"][name], *ends)


@pytest.fixture(scope="module")
def known() -> set[Figure]:
    """Return all figures of the committed results, to one decimal, either way round."""
    found: set[Figure] = set()
    for file in RESULTS.glob("*.json"):
        for mean, low, high in figures(json.loads(file.read_text("utf-8"))):
            found.add((round(mean, 1), round(low, 1), round(high, 1)))
            found.add((round(-mean, 1), round(-high, 1), round(-low, 1)))
    return found


def test_no_page_drops_out() -> None:
    """A page that writes its figures otherwise would be read no more."""
    assert {page.name for page in PAGES} >= SHOWN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_intervals_on_a_page_stand_in_a_committed_result(page: Path, known: set[Figure]) -> None:
    unknown = [
        f"line {number}: {found.group()}"
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1)
        for found in INTERVAL.finditer(line)
        if tuple(map(float, found.groups())) not in known
    ]
    assert not unknown, f"{page.name}: in no file of benchmarks/results: {unknown}"
