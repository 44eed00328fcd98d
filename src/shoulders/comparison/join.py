"""Put comparisons of one plan together: parts of it that ran in several folders, or machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoulders.comparison.ledger import GROWING, NAMED
from shoulders.comparison.plan import make_plan
from shoulders.comparison.rows import rows_of, tasks_of
from shoulders.errors import DataError

WANTED = ("plan", "methods", "runs", "trials", "forgetting", "interference", "latency_ms", "lm",
          "machine", "rows", "date")  # fmt: skip
FILES = ("data", "test", "forgetting")  # of a plan: they may lie elsewhere on another machine


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """Return one result of several `compare.json`, as `run_comparison` returns one.

    A run that several hold is taken from the first of them, and so are the milliseconds that an
    answer of a method takes. All must have asked the same test rows: runs are paired row by row.

    Raises:
        DataError: a file that is no result, whose plan, LM or rows differ from the first's, or
            that does not say which rows its runs have right.
    """
    results = [_read(path) for path in paths]
    first = results[0]
    shared = _same(first)
    hashed: dict[str, str] | None = None
    for path, one in zip(paths, results, strict=True):
        mine = one.get("rows_sha256")  # earlier versions did not note it
        if mine and hashed and mine != hashed:
            raise DataError(f"{path}: its training or test rows are not those of the others")
        hashed = hashed or mine
    for path, other in zip(paths[1:], results[1:], strict=True):
        theirs = _same(other)
        for what, own in shared.items():
            if theirs[what] != own:
                raise DataError(f"{path}: {what} differs from that of {paths[0]}: not comparable")
    defined: dict[str, tuple[str, Any, Path]] = {}
    for path, result in zip(paths, results, strict=True):
        for key in NAMED:
            for name, own in result["plan"][key].items():
                earlier = defined.setdefault(name, (key, own, path))
                if earlier[:2] != (key, own):
                    raise DataError(f"{path}: {key}.{name} is not what it is in {earlier[2]}")
    plan = {**first["plan"]}
    for key in GROWING:
        values = [result["plan"][key] for result in results]
        if isinstance(values[0], dict):
            plan[key] = {name: value for own in reversed(values) for name, value in own.items()}
        else:
            plan[key] = list(dict.fromkeys(one for own in values for one in own))
    for result in results:  # of a text of its own, where its plan names none
        base = next(
            (f["perplexity"] for f in result["forgetting"] if f["method"] == "frozen"), None
        )
        for one in result["forgetting"]:
            if base is not None and one["method"] != "frozen":
                one.setdefault("before", base)
    trained = [run for result in results for run in result["runs"] if run["family"] != "bare"]
    seen = {run["seed"] for run in trained}
    plan["seeds"] = sorted(seen) or plan["seeds"]
    several = {
        "methods": _once(results, "methods", ("method",)),
        **{key: _once(results, key, ("method", "seed"))
           for key in ("runs", "forgetting", "interference")},
        "trials": [trial for result in results for trial in result["trials"]],
        "latency_ms": {k: v for r in reversed(results) for k, v in r["latency_ms"].items()},
    }  # fmt: skip
    done = {(run["method"], run["seed"]) for run in several["runs"]}
    left = _once([{"unfinished": [], **r} for r in results], "unfinished", ("method", "seed"))
    machines = [result["machine"] for result in results]
    return {
        **first,
        **({"rows_sha256": hashed} if hashed else {}),
        **several,
        "unfinished": [run for run in left if (run["method"], run["seed"]) not in done],
        "plan": plan,
        "lm": next((r["lm"] for r in results if _changed(r["lm"])), first["lm"]),
        "machine": {
            **machines[0],
            "processor": ", ".join(dict.fromkeys(m["processor"] for m in machines)),
        },
        "joined": [
            {"file": str(path), "date": r["date"], "machine": r["machine"]}
            for path, r in zip(paths, results, strict=True)
        ],
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = result["benchmark"] == "compare" and all("right" in r for r in result["runs"])
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise DataError(f"{path}: is no compare.json that says which rows each run has right")
    if missing := [key for key in WANTED if key not in result]:
        raise DataError(f"{path}: damaged: {missing[0]} is missing")
    plan = make_plan(result["plan"], str(path))
    # What earlier versions did not note: read from the test rows themselves.
    if "test_tasks" not in result:
        result["test_tasks"] = tasks_of(rows_of(plan))
    # As this version writes it: what earlier ones did not have yet stands at its default.
    result["plan"] = plan.model_dump(mode="json")
    try:
        result["test_tasks"] = [(task, int(count)) for task, count in result["test_tasks"]]
        tested = sum(count for _, count in result["test_tasks"])
        for run in result["runs"]:
            if len(run["right"]) != tested or set(run["right"]) - {"0", "1"}:
                raise ValueError(f"{run['method']}, seed {run['seed']}")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged: the test rows that runs have right: {error}") from None
    return result


def _same(result: dict[str, Any]) -> dict[str, Any]:
    """Return what two comparisons must have in common."""
    plan = make_plan(result["plan"]).model_dump(mode="json")
    data = {k: v for k, v in plan["data"].items() if k not in ("train", "validation", "templates")}
    return {
        "its plan": {k: v for k, v in plan.items() if k not in (*GROWING, *FILES)} | data,
        "its LM": result["lm"]["fingerprint"],
        "the number of its rows": result["rows"],
        "the order of its test rows": result["test_tasks"],
    }


def _changed(lm: dict[str, Any]) -> bool:
    return bool(lm["digest_before"] != lm["digest_after"])


def _once(results: Sequence[dict[str, Any]], what: str, by: Sequence[str]) -> list[dict[str, Any]]:
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        for one in result[what]:
            found.setdefault(tuple(one[key] for key in by), one)
    return list(found.values())
