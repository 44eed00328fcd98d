"""The runs of a comparison on disk: one row for every finished one, so that it can be stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from shoulders.errors import ShouldersError, TrainingError
from shoulders.files import remove_partial, write_json, write_text

PLAN, RUNS = "plan.json", "runs.jsonl"
GROWING = ("methods", "seeds", "own")  # what a resumed plan may name more of


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
        if out.is_dir():
            remove_partial(out)
        self._rows: list[dict[str, Any]] = []
        if self._file.is_file():
            for number, line in enumerate(self._file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    self._rows.append(json.loads(line))
                except json.JSONDecodeError:
                    raise ShouldersError(
                        f"{self._file}:{number}: is no run; remove that line to run it again"
                    ) from None

    def begin(self, plan: dict[str, Any], *, resume: bool) -> None:
        """Note the plan; with `resume` it may name more methods and seeds than the one begun.

        Raises:
            TrainingError: another plan was begun here, or this one, and `resume` is off.
        """
        file = self.out / PLAN
        if file.is_file():
            begun = json.loads(file.read_text(encoding="utf-8"))
            if not extends(plan, begun):
                raise TrainingError(
                    f"{self.out}: was begun with another plan (only methods and seeds may be "
                    "added); choose another --out"
                )
            if not resume:
                raise TrainingError(
                    f"{self.out}: holds a comparison; add --resume, or another --out"
                )
        write_json(file, plan)

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

    def scores(self, method: str, seed: int) -> list[tuple[str, float]]:
        """Return the test rows' tasks and exact matches (0 or 1) of a finished run, in order."""
        file = self.predictions(method, seed)
        lines = file.read_text(encoding="utf-8").splitlines()
        return [(p["task"], p["exact_match"]) for p in map(json.loads, lines)]

    def answers(self, method: str, seed: int) -> list[str]:
        """Return what a finished run has answered to the test rows."""
        lines = self.predictions(method, seed).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prediction"] for line in lines]

    def predictions(self, method: str, seed: int) -> Path:
        """Return the file of a run's answers."""
        return self.folder(method, seed) / "predictions.jsonl"

    def folder(self, method: str, seed: int, stage: str = "runs") -> Path:
        """Return the folder of a run."""
        return self.out / stage / f"{method}-seed{seed}"


def extends(plan: dict[str, Any], begun: dict[str, Any]) -> bool:
    """Return whether every run of the plan `begun` is a run of `plan` as well."""
    alike = all(plan[key] == begun.get(key) for key in plan if key not in GROWING)
    more = all(value in plan[key] for key in ("methods", "seeds") for value in begun[key])
    return alike and more and begun["own"].items() <= plan["own"].items()
