"""Contenders of a benchmark: processes of their own, run by turns, each printing one JSON line."""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.errors import ShouldersError
from shoulders.lm.gguf import converted, embedded_lm
from shoulders.lm.load import EMBEDDED
from shoulders.progress import quiet_progress


@dataclass(frozen=True, slots=True)
class Contender:
    """A name and the command line that measures it once."""

    name: str
    command: Sequence[str]


def by_turns(
    contenders: Sequence[Contender], runs: int, console: Console
) -> dict[str, list[dict[str, Any]]]:
    """Run every contender `runs` times, one after the other in every round; return what they said.

    Each run is a fresh process alone on the machine: no memory or cache is shared, and a slow
    minute of the machine hits all alike. Ctrl-C ends it early: what is returned then is of the
    rounds that had ended.

    Raises:
        ShouldersError: a contender failed, with the last line of what it said.
        KeyboardInterrupt: it was stopped in the first round.
    """
    rounds: list[list[dict[str, Any]]] = []
    with quiet_progress(console, "measuring", runs * len(contenders)) as advance:
        try:
            while len(rounds) < runs:
                ended = []
                for contender in contenders:
                    ended.append(measured(contender))
                    advance(1)
                rounds.append(ended)
        except KeyboardInterrupt:
            if not rounds:
                raise
    several = zip(*rounds, strict=True)
    return {c.name: list(own) for c, own in zip(contenders, several, strict=True)}


def measured(contender: Contender) -> dict[str, Any]:
    """Run a contender once and return the JSON of the last line that is a mapping.

    Raises `ShouldersError` where it ends otherwise, with what ended it.
    """
    done = subprocess.run(list(contender.command), capture_output=True, text=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        why = ", as the system does where memory ends" if name == "SIGKILL" else ""
        raise ShouldersError(f"benchmark {contender.name} was ended by {name}{why}")
    found = None if done.returncode else _mapping(done.stdout)
    if found is None:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise ShouldersError(f"benchmark {contender.name} failed: {said}")
    return found


def _mapping(said: str) -> dict[str, Any] | None:
    # Libraries print beside what a worker reports, after it too.
    for line in reversed(said.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                value: dict[str, Any] = json.loads(line)
                return value
    return None


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Return the median of a figure over runs."""
    return float(statistics.median(run[key] for run in runs))


def peer_lm(name: str) -> str:
    """Return an LM's name as other libraries know it: the embedded one, or a GGUF, is a folder."""
    if name.endswith(".gguf"):
        return str(converted(Path(name)))
    return str(embedded_lm()) if name == EMBEDDED else name


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows that all contenders read."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read what `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
