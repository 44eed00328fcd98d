"""What a worker decodes: entries, and the rows that they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

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
        fellows: of an ensemble, what its other members read; the entry is the first one's.
    """

    job: Job
    ask: Ask
    ids: list[int]
    prompt: Prompt
    hops: list[Hop]
    done: Done
    here: bool = True
    fellows: tuple[Entry, ...] = ()
    completions: dict[int, Completion] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Samples that it comes to; each takes a slot, and one for every fellow."""
        return self.ask.decoding.n

    @property
    def every(self) -> tuple[Entry, ...]:
        """The entry and its fellows."""
        return self, *self.fellows

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
        return min(window, self.taken + len(self.ids) + self.ask.decoding.max_new_tokens)

    @property
    def taken(self) -> int:
        """Positions that its longest prompt takes."""
        prompts = [self.prompt, *(hop.prompt for hop in self.hops)]
        return max(int(p.lengths().max()) for p in prompts)


@dataclass(slots=True, eq=False)
class Row:
    """One sample of an entry; before its input is read, all of them.

    Attributes:
        fellows: of an ensemble, the other members' rows of the same sample.
        leads: whether it is no fellow of another row.
        state: the LM's last state `[d]`, from when all is read until a token is chosen.
        slots: one for each pass.
        pending: tokens to read.
        tokens: how many it has read.
        running: None until the input, and that of its fellows, is read.
    """

    entry: Entry
    slots: list[int]
    pending: list[int]
    tokens: int = 0
    running: Running | None = None
    fellows: tuple[Row, ...] = ()
    leads: bool = True
    state: Tensor | None = None

    @property
    def every(self) -> tuple[Row, ...]:
        """The row and its fellows."""
        return self, *self.fellows
