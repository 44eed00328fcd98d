"""How long work tells of itself: stages with a number of things done, and notes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

Advance = Callable[[int], None]


class Watch(Protocol):
    """Is told what happens; the command line shows bars, a program may stay silent."""

    def note(self, text: str) -> None:
        """Tell one line, about what was left out for instance."""
        ...

    def stage(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Advance]:
        """Begin a stage of `total` things (a guess at times), `done` of them earlier."""
        ...


class Silent:
    """A watch that shows nothing and keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        """Keep the line."""
        self.notes.append(text)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Advance]:  # noqa: ARG002
        """Show nothing."""
        yield lambda _: None
