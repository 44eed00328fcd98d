"""A plan for a user's own file of rows: split by input, the same way every time."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from shoulders.comparison.plan import Plan, make_plan
from shoulders.data.rows import Row, as_line, read_rows
from shoulders.errors import DataError
from shoulders.files import write_text

LEAST_ROWS = 10  # distinct rows: fewer cannot be split into three
SPLITS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def plan_of_rows(file: Path, out: Path, **settings: Any) -> Plan:
    """Return a plan for a file of rows, split by input into `out/data`.

    Rows with the same task and input stay together, so that nothing of the test is trained on; so
    do inputs that differ in capitals and spaces alone.
    Every task is split alike, by a hash of its inputs: the same file gives the same split.

    Raises:
        DataError: the file, too few different rows, or `out` holds other rows.
        RecipeError: a setting.
    """
    groups: dict[str, dict[str, list[Row]]] = {}
    alike: dict[tuple[str, str], str] = {}  # the first input of those that are nearly the same
    for row in read_rows(file):
        same = " ".join(row.input.casefold().split())
        text = alike.setdefault((row.task, same), row.input)
        groups.setdefault(row.task, {}).setdefault(text, []).append(row)
    inputs = sum(len(own) for own in groups.values())
    if inputs < LEAST_ROWS:
        raise DataError(f"{file}: {inputs} different inputs; a comparison needs {LEAST_ROWS}")
    splits: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for task in sorted(groups):
        order = sorted(groups[task], key=functools.partial(_hash, task))
        # Of three inputs or more one at least is tested, whatever rounding says.
        n = len(order)
        first = max(1, min(round(n * SPLITS["train"]), n - 2))
        second = first + max(1, min(round(n * SPLITS["validation"]), n - first - 1))
        parts = {"train": order[:first], "validation": order[first:second], "test": order[second:]}
        for name, texts in parts.items():
            splits[name] += [row for text in texts for row in groups[task][text]]
    if not splits["test"]:
        raise DataError(f"{file}: its tasks have too few rows to test on; three each at least")
    plan = make_plan(
        {
            "data": {
                "train": [str(out / "data/train.jsonl")],
                "validation": [str(out / "data/validation.jsonl")],
                "temperature": 3,
            },
            "test": [str(out / "data/test.jsonl")],
            **settings,
        }
    )
    written = {out / "data" / f"{name}.jsonl": "".join(map(as_line, own))
             for name, own in splits.items()}  # fmt: skip
    if (out / "plan.json").is_file() and all(part.is_file() for part in written):
        # One that was begun keeps its split: earlier versions split small tasks otherwise.
        there = "".join(part.read_text(encoding="utf-8") for part in written)
        if sorted(there.split("\n")) != sorted("".join(written.values()).split("\n")):
            raise DataError(f"{out}: holds a comparison of other rows; choose another --out")
    else:
        for part, text in written.items():
            if part.exists() and part.read_text(encoding="utf-8") != text:
                raise DataError(f"{part}: is there, and of other rows; choose another --out")
        for part, text in written.items():
            write_text(part, text)
    return plan


def untested(plan: Plan) -> list[str]:
    """Return the tasks of a plan's training rows that none of its test rows is of."""
    train, test = ({r.task for name in f for r in read_rows(Path(name))}
                   for f in (plan.data.train, plan.test))  # fmt: skip
    return sorted(train - test)


def _hash(task: str, text: str) -> str:
    return hashlib.sha256(f"{task}\n{text}".encode()).hexdigest()
