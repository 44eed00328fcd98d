"""The runs of a comparison on disk: one row for every finished one, so that it can be stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoulders.comparison.plan import Plan, make_plan
from shoulders.errors import DataError, RecipeError, ShouldersError, TrainingError
from shoulders.files import read_noted, remove_partial, sha256_of_path, write_json, write_text

PLAN, RUNS, SHA256 = "plan.json", "runs.jsonl", "sha256"
NAMED = ("own", "variants", "ensembles")
GROWING = ("methods", "seeds", *NAMED)  # what a resumed plan may name more of


class Ledger:
    """Finished runs by what they are (`stage`, `method`, `seed`, ...), kept in `runs.jsonl`.

    Args:
        out: the comparison's folder.

    Raises:
        ShouldersError: names the line that is no run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._file = out / RUNS
        self._noted: dict[str, Any] = {}
        if out.is_dir():
            remove_partial(out)
        self._rows: list[dict[str, Any]] = []
        if self._file.is_file():
            for number, line in enumerate(_lines(self._file), 1):
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if not isinstance(row, dict):
                    raise ShouldersError(
                        f"{self._file}:{number}: is no run; remove that line to run it again"
                    )
                self._rows.append(row)

    def begin(self, plan: Plan, *, resume: bool) -> None:
        """Look whether a plan may run here; with `resume` it may name more than the one begun.

        Its files are told by content: they may have moved, but not changed.

        Raises:
            TrainingError: another plan was begun here, or this one, and `resume` is off.
            DataError: a file is missing.
        """
        file = self.out / PLAN
        for name in plan.files:
            if not Path(name).exists():
                raise DataError(f"{name}: no such file")
        noted = {**plan.model_dump(mode="json"), SHA256: hashes_of(plan)}
        if file.is_file():
            begun = read_noted(file)
            if changed := differing(noted, begun):
                raise TrainingError(
                    f"{self.out}: was begun with another plan or other rows ({changed}; "
                    f"{', '.join(GROWING)} may be added to); choose another --out"
                )
            if not resume:
                raise TrainingError(
                    f"{self.out}: holds a comparison; add --resume, or another --out"
                )
        self._noted = noted

    def note(self) -> None:
        """Write down the plan that was begun with: from now on it may only grow."""
        write_json(self.out / PLAN, self._noted)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the finished run with these facts, if there is one."""
        return next((row for row in self._rows if key.items() <= row.items()), None)

    def every(self, **key: Any) -> list[dict[str, Any]]:
        """Return all finished runs with these facts, in the order in which they ended."""
        return [row for row in self._rows if key.items() <= row.items()]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Note a finished run, atomically, and return it as it will be read again."""
        row = json.loads(json.dumps(row, allow_nan=False))
        text = "".join(json.dumps(r) + "\n" for r in (*self._rows, row))
        write_text(self._file, text)
        self._rows.append(row)
        return row

    def replace(self, row: dict[str, Any], key: dict[str, Any]) -> dict[str, Any]:
        """Note a run in place of those with the facts of `key`, if there are any."""
        self._rows = [old for old in self._rows if not key.items() <= old.items()]
        return self.add(row)

    def scores(self, method: str, seed: int) -> list[tuple[str, float]]:
        """Return the test rows' tasks and exact matches (0 or 1) of a finished run, in order."""
        lines = _lines(self.predictions(method, seed))
        return [(p["task"], p["exact_match"]) for p in map(json.loads, lines)]

    def right(self, method: str, seed: int) -> str:
        """Return 1 for each test row that a finished run has right, 0 for others, in order.

        With them runs of other comparisons on the same rows can be compared row by row.
        """
        return "".join(str(int(score)) for _, score in self.scores(method, seed))

    def answers(self, method: str, seed: int) -> list[str]:
        """Return what a finished run has answered to the test rows."""
        lines = _lines(self.predictions(method, seed))
        return [json.loads(line)["prediction"] for line in lines]

    def predictions(self, method: str, seed: int) -> Path:
        """Return the file of a run's answers."""
        return self.folder(method, seed) / "predictions.jsonl"

    def folder(self, method: str, seed: int, stage: str = "runs") -> Path:
        """Return the folder of a run."""
        return self.out / stage / f"{method}-seed{seed}"


def _lines(file: Path) -> list[str]:
    """Return a JSONL file's lines: `splitlines` would end them inside texts too (U+2028)."""
    text = file.read_text(encoding="utf-8").removesuffix("\n")
    return text.split("\n") if text else []


def hashes_of(plan: Plan) -> dict[str, str]:
    """Return the SHA-256 of each of a plan's files."""
    return {name: sha256_of_path(Path(name)) for name in plan.files}


def differing(noted: dict[str, Any], begun: dict[str, Any]) -> str:
    """Return what keeps a run of the plan `begun` from being one of `noted`: a key, or nothing."""
    try:
        plan, earlier = by_content(noted), by_content(begun)
    except (RecipeError, KeyError) as error:
        return str(error)
    for key in plan:
        if key in ("methods", "seeds"):
            changed = [f" without {value}" for value in earlier[key] if value not in plan[key]]
        elif key in NAMED:
            changed = [f".{n}" for n, own in earlier[key].items() if plan[key].get(n) != own]
        else:
            changed = [""] if plan[key] != earlier[key] else []
        if changed:
            return f"{key}{changed[0]}"
    return ""


def by_content(noted: dict[str, Any]) -> dict[str, Any]:
    """Return a noted plan with the hashes of its files in place of their names."""
    values = {key: value for key, value in noted.items() if key != SHA256}
    plan = make_plan(values).model_dump(mode="json")  # what an earlier version did not have yet
    hashes = noted[SHA256]

    def contents(names: list[str]) -> list[str]:
        return [hashes[name] for name in names]

    data, forgetting = plan["data"], plan["forgetting"]
    data |= {key: contents(data[key]) for key in ("train", "validation")}
    data["templates"] = contents([data["templates"]] if data["templates"] else [])
    forgetting |= {key: contents(forgetting[key]) for key in ("text", "rows")}
    return {**plan, "test": contents(plan["test"])}
