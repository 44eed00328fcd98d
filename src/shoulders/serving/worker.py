"""Continuous batching over embeddings: rows of any skills join, share decode steps, and leave.

One thread, one set of slots. Every step reads what each row has to read next (a token that was just
chosen, or the next piece of a new input) in one call per pass, whatever the rows' skills; new rows
enter and finished ones leave between two steps. A row sees its own slot alone, so that its answer
does not depend on what else is being served (promise 3).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, Delta, Running, advance, choose
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.sampling import sample_stream
from shoulders.recursion.chain import Hop, carried
from shoulders.recursion.memory import Memory
from shoulders.serving.job import Ask, Job
from shoulders.serving.pool import Pool

PIECE = 256  # tokens of new inputs that one step reads: running rows wait no longer than that
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
class _Row:
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


class Worker(threading.Thread):
    """Generates for the entries that it is given, until it is closed.

    Args:
        lm: with fused layers.
        number: for the thread's name.
        threads: of the processor, for this worker's products.
        cache_bytes: most that its keys/values may take.
        max_rows: most rows in one step.
    """

    def __init__(
        self, lm: FrozenLM, number: int, *, threads: int, cache_bytes: int, max_rows: int
    ) -> None:
        super().__init__(name=f"worker-{number}", daemon=True)
        self._lm, self._threads = lm, threads
        self._bytes, self._max_rows = cache_bytes, max_rows
        self._wake = threading.Condition()
        self._inbox: deque[Entry] = deque()
        self._rows: list[_Row] = []
        self._pools: dict[int, Pool] = {}
        self._memories: dict[tuple[int, int], Memory] = {}
        self._closed = False
        self.tokens = self.steps = 0  # for metrics: new tokens, and steps that made them

    @property
    def load(self) -> int:
        """Rows that run or wait."""
        return len(self._rows) + sum(entry.rows for entry in self._inbox)

    @property
    def running(self) -> int:
        """Rows that share the present step."""
        return len(self._rows)

    def give(self, entry: Entry) -> None:
        """Add an entry; it joins between two steps."""
        with self._wake:
            self._inbox.append(entry)
            self._wake.notify()

    def close(self) -> None:
        """End the thread when all it was given is answered."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def run(self) -> None:
        """Step until closed."""
        torch.set_num_threads(self._threads)
        while True:
            with self._wake:
                while not (self._rows or self._inbox or self._closed):
                    self._wake.wait()
                if self._closed and not self._rows and not self._inbox:
                    return
            try:
                self._admit()
                if self._rows:
                    self._step()
            except Exception as error:  # nobody may wait for an answer that never comes
                self._fail(error)

    # -- joining and leaving -------------------------------------------------------------

    def _admit(self) -> None:
        self._drop_cancelled()
        while self._inbox:
            entry = self._inbox[0]
            over, fits = entry.job.over, self._fits(entry)
            if not over and not fits and self._rows:
                return  # others leave first
            self._inbox.popleft()
            try:
                if over:
                    raise ShouldersError("cancelled")
                if not fits:
                    raise ShouldersError("the request needs more memory than the server has")
                self._enter(entry)
            except Exception as error:  # it waits no more, and is no row yet: nobody else would say
                entry.done(error)

    def _enter(self, entry: Entry) -> None:
        """Give an entry a slot in each pass, or in none."""
        room = entry.positions(self._lm.max_positions)
        slots: list[int] = []
        try:
            for i, prompt in enumerate([*(hop.prompt for hop in entry.hops), entry.prompt]):
                slots.append(self._pool(self._level(entry, i)).enter(prompt, room))
        except Exception:
            for i, slot in enumerate(slots):
                self._pool(self._level(entry, i)).leave(slot)
            raise
        self._rows.append(_Row(entry, slots, list(entry.ids)))

    def _fits(self, entry: Entry) -> bool:
        rows = sum(1 if row.running else row.entry.rows for row in self._rows) + entry.rows
        if self._rows and rows > self._max_rows:
            return False
        room = entry.positions(self._lm.max_positions)
        passes = 1 + max([len(entry.hops), *(len(row.entry.hops) for row in self._rows)])
        last = self._pool(-1)
        return rows * max(room, last.room) * last.position_bytes * passes <= self._bytes

    def _drop_cancelled(self) -> None:
        over = [row for row in self._rows if row.entry.job.over]
        for row in over:
            self._leave(row)
        for entry in {id(row.entry): row.entry for row in over}.values():
            entry.done(ShouldersError("cancelled"))

    def _leave(self, row: _Row) -> None:
        for i, slot in enumerate(row.slots):
            self._pool(self._level(row.entry, i)).leave(slot)
        self._rows.remove(row)
        kept = {(id(h.link), i) for other in self._rows for i, h in enumerate(other.entry.hops)}
        # Nobody is here: let the memory go; the link's skill may be served no more.
        self._memories = {key: m for key, m in self._memories.items() if key in kept}

    def _fail(self, error: Exception) -> None:
        entries = {id(row.entry): row.entry for row in self._rows}
        self._rows = []
        self._pools, self._memories = {}, {}
        for entry in entries.values():
            entry.done(error)

    @staticmethod
    def _level(entry: Entry, number: int) -> int:
        """Return the key of a pass's pool: the last passes of all rows share one."""
        return number if number < len(entry.hops) else -1

    def _pool(self, level: int) -> Pool:
        if level not in self._pools:
            assert self._lm.blocks is not None  # the engine gives workers no other LM
            self._pools[level] = Pool(self._lm, self._lm.blocks)
        return self._pools[level]

    # -- a step --------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        """Read what every row has to read, and choose the next token of those that are through."""
        rows, pieces, left = [], [], PIECE
        for row in self._rows:
            piece = row.pending[: len(row.pending) if row.running else max(1, left)]
            if row.running is None:
                if left <= 0:
                    continue
                left -= len(piece)
            rows.append(row)
            pieces.append(piece)
        embedded = self._lm.embed_rows(pieces).split([len(p) for p in pieces])
        current = list(embedded)
        for number in range(max(len(row.entry.hops) for row in rows)):
            current = self._hop(number, rows, list(embedded), current)
        states = self._read(-1, rows, current, [row.entry.prompt for row in rows])
        through, last = [], []
        for row, piece, state in zip(rows, pieces, states, strict=True):
            row.pending = row.pending[len(piece) :]
            row.tokens += len(piece)
            if not row.pending:
                through.append(row)
                last.append(state[-1])
        if through:
            self._choose(through, self._lm.logits(torch.stack(last)))

    def _hop(
        self, number: int, rows: Sequence[_Row], tokens: list[Tensor], current: list[Tensor]
    ) -> list[Tensor]:
        """Take the rows that have such a pass through it and its link."""
        links: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if number < len(row.entry.hops):
                links.setdefault(id(row.entry.hops[number].link), []).append(i)
        for key, own in links.items():
            mine = [rows[i] for i in own]
            link = mine[0].entry.hops[number].link
            prompts = [row.entry.hops[number].prompt for row in mine]
            states = self._read(number, mine, [current[i] for i in own], prompts, link.taps)
            memory = self._memories.setdefault((key, number), Memory(0))
            slots = torch.tensor([row.slots[number] for row in mine])
            seen = torch.tensor([row.tokens for row in mine])
            counts = [len(tokens[i]) for i in own]
            written = carried(
                link,
                torch.cat(states, -2),
                torch.cat([tokens[i] for i in own]),
                counts,
                memory.view(slots, seen),
            )
            for i, piece in zip(own, written.split(counts), strict=True):
                current[i] = piece
        return current

    def _read(
        self,
        level: int,
        rows: Sequence[_Row],
        current: Sequence[Tensor],
        prompts: Sequence[Prompt],
        taps: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """Read one pass; prompt vectors stand before a row's first piece."""
        pieces, before = [], []
        for row, own, prompt in zip(rows, current, prompts, strict=True):
            vectors = prompt.vectors[0, prompt.vector_mask[0]] if row.tokens == 0 else None
            if vectors is not None and len(vectors):
                pieces.append(torch.cat([vectors.to(own), own]))
                before.append(len(vectors))
            else:
                pieces.append(own)
                before.append(0)
        slots = [row.slots[level if level >= 0 else len(row.entry.hops)] for row in rows]
        counts = [len(piece) for piece in pieces]
        states = self._pool(level).read(torch.cat(pieces), counts, slots, taps)
        found = states.split(counts, -2)
        return [own[..., p:, :] for own, p in zip(found, before, strict=True)]

    def _choose(self, through: Sequence[_Row], logits: Tensor) -> None:
        """Choose tokens; rows that have just read their input become as many as are wanted."""
        rows: list[_Row] = []
        index: list[int] = []
        for i, row in enumerate(through):
            own = [row] if row.running else self._samples(row)
            rows += own
            index += [i] * len(own)
        running = [row.running for row in rows if row.running is not None]
        chosen = choose(self._lm, logits[torch.tensor(index)], running).tolist()
        self.tokens, self.steps = self.tokens + len(rows), self.steps + 1
        for row, state, token in zip(rows, running, chosen, strict=True):
            row.pending = [token]
            if row.entry.take(advance(self._lm, state)):
                self._leave(row)

    def _samples(self, row: _Row) -> list[_Row]:
        """Return the samples of a row that has read its input: they share what was read."""
        entry, config = row.entry, row.entry.ask.decoding
        copies = [
            self._pool(self._level(entry, i)).copy(slot, config.n - 1)
            for i, slot in enumerate(row.slots)
        ]
        for number, hop in enumerate(entry.hops):
            if copies[number]:
                memory = self._memories[id(hop.link), number]
                memory.copy(row.slots[number], torch.tensor(copies[number]))
        taken = max(int(p.lengths().max()) for p in (entry.prompt, *(h.prompt for h in entry.hops)))
        room = self._lm.max_positions - taken - len(entry.ids) + 1
        found = [row]
        for k in range(config.n - 1):
            found.append(_Row(entry, [own[k] for own in copies], [], row.tokens))
        for sample, one in enumerate(found):
            random = sample_stream(config.seed, entry.ids, sample)
            one.running = Running(0, sample, config, random, min(config.max_new_tokens, room))
        self._rows += found[1:]
        return found
