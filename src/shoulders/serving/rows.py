"""What a worker decodes: entries, and the rows that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from shoulders.lm.decode import Completion, Delta, Running
from shoulders.lm.prompt import Prompt
from shoulders.recursion.chain import Hop
from shoulders.serving.job import Ask, Job

Done = Callable[[list[Completion] | Exception], None]


@dataclass(slots=True, eq=False)
class Entry:
    """An ask that is ready to be read.

    Attributes:
        job, ask: what is answered.
        ids: the input's tokens.
        prompt: the last pass's, of one row.
        hops: earlier passes.
        done: told of all completions, or of why there are none.
        here: whether this process answers it, or a remote engine.
    """

    job: Job
    ask: Ask
    ids: list[int]
    prompt: Prompt
    hops: list[Hop]
    done: Done
    here: bool = True
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Slots that it comes to need."""
        return self.ask.decoding.n

    def take(self, delta: Delta) -> bool:
        """Pass a piece of text on; tell whether its sample has ended."""
        shown = self.ask.unprefixed(delta)
        if shown is None:
            return False
        if self.ask.shown and (shown.text or shown.completion):
            self.job.on_event(shown)
        if shown.completion is None:
            return False
        self.completions[delta.sample] = shown.completion
        if len(self.completions) == self.rows:
            self.done([self.completions[k] for k in range(self.rows)])
        return True

    def positions(self, window: int) -> int:
        """Positions that each of them comes to need."""
        lengths = [self.prompt, *(hop.prompt for hop in self.hops)]
        longest = max(int(p.lengths().max()) for p in lengths)
        return min(window, longest + len(self.ids) + self.ask.decoding.max_new_tokens)


@dataclass(slots=True, eq=False)
class Row:
    """One sample of an entry; before its input is read, all of them.

    Attributes:
        slots: one for each pass.
        pending: tokens to read.
        tokens: how many it has read.
        running: None until the input is read.
    """

    entry: Entry
    slots: list[int]
    pending: list[int]
    tokens: int = 0
    running: Running | None = None
