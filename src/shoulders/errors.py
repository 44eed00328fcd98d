"""Errors a user can act on: one line that names the place (file, line, key) and the fix.

The command line prints the message alone and exits with 2; anything that is *not* a
`ShouldersError` is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec


class ShouldersError(Exception):
    """Base of every error that a user, not a developer, has to fix."""


class DataError(ShouldersError):
    """A data file, row or template cannot be used."""


class RecipeError(ShouldersError):
    """A recipe (YAML) has an unknown key or an invalid value."""


class LMError(ShouldersError):
    """A language model or encoder cannot be found, verified or loaded."""


class WindowError(ShouldersError):
    """A sequence does not fit into the frozen LM's window.

    Args:
        reason: what does not fit into what, and the fix.
        row: its number (from 1) among those given at once.
        text: what was to be read, to find its place in the data by; see `placed`.
    """

    def __init__(self, reason: str, row: int | None = None, text: str | None = None) -> None:
        super().__init__(reason if row is None else f"row {row} {reason}")
        self.reason, self.text = reason, text


class ArtefactError(ShouldersError):
    """A skill folder is missing, damaged, or bound to another LM."""


class TrainingError(ShouldersError):
    """Training cannot go on: it diverged, does not learn, or cannot be resumed."""


class DivergedError(TrainingError):
    """Training does not work at these learning rates: it diverges, or moves nothing."""


class InterruptedTraining(TrainingError):  # noqa: N818 - it is one, and not a failure
    """Training was stopped by the user; its checkpoint is on disk."""


class InterruptedBenchmark(ShouldersError):  # noqa: N818 - as above
    """A benchmark was stopped by the user; what is told is of the rounds that had ended."""


@contextmanager
def placed(texts: Sequence[str], places: Sequence[str | None]) -> Iterator[None]:
    """Name the file and line of a text that does not fit, where a pass says which text it was.

    By the text, not by its number: passes and engines read parts of what they are given. Texts
    without a place are left as they are.
    """
    try:
        yield
    except WindowError as error:
        pairs = zip(texts, places, strict=True)
        found = next((place for text, place in pairs if text == error.text), None)
        if found is None:
            raise
        raise WindowError(f"{found}: {error.reason}", text=error.text) from None


def install(extra: str) -> str:
    """Return the command that brings what an extra holds; no package index has this project yet."""
    return f"pip install -e '.[{extra}]' in a clone of shoulders"


def require(extra: str, *modules: str) -> None:
    """Raise `ShouldersError` now for what is missing later: hours of work may lie between."""
    for module in modules:
        if find_spec(module) is None:
            raise ShouldersError(f"{module} is not installed; run: {install(extra)}")


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the choice most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
