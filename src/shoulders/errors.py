"""Errors a user can act on: one line that names the place (file, line, key) and the fix.

The command line prints the message alone and exits with 2; anything that is *not* a
`ShouldersError` is a defect of this package and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShouldersError(Exception):
    """Base of every error that a user, not a developer, has to fix."""


class DataError(ShouldersError):
    """A data file, row or template cannot be used."""


class RecipeError(ShouldersError):
    """A recipe (YAML) has an unknown key or an invalid value."""


class LMError(ShouldersError):
    """A language model or encoder cannot be found, verified or loaded."""


class WindowError(ShouldersError):
    """A sequence does not fit into the frozen LM's window."""


class ArtefactError(ShouldersError):
    """A skill folder is missing, damaged, or bound to another LM."""


class TrainingError(ShouldersError):
    """Training cannot go on: it diverged, does not learn, or cannot be resumed."""


class DivergedError(TrainingError):
    """Training does not work at these learning rates: it diverges, or moves nothing."""


class InterruptedTraining(TrainingError):  # noqa: N818 - it is one, and not a failure
    """Training was stopped by the user; its checkpoint is on disk."""


def install(extra: str) -> str:
    """Return the command that brings what an extra holds; no package index has this project yet."""
    return f"pip install -e '.[{extra}]' in a clone of shoulders"


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the choice most like `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
