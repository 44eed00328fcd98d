"""Stages of long work as progress bars."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Bars:
    """A `shoulders.reader.watch.Watch`: stages as progress bars on the console of notes."""

    def __init__(self, console: Console) -> None:
        self.notes: list[str] = []
        self._console = console

    def note(self, text: str) -> None:
        """See `Watch`."""
        self.notes.append(text)
        self._console.print(f"note: {text}", markup=False, highlight=False)

    @contextlib.contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """See `Watch`."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[speed]:,.0f} per second"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        began, now = time.monotonic(), done
        with bar:
            task = bar.add_task(name, total=total, completed=done, speed=0.0)

            def advance(count: int) -> None:
                nonlocal now
                now += count
                speed = (now - done) / max(time.monotonic() - began, 1e-9)
                bar.update(task, completed=now, total=max(total, now), speed=speed)

            yield advance
