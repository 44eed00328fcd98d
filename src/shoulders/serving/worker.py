"""Continuous batching over embeddings: rows of any skills join, share decode steps, and leave.

One thread, one set of slots. Every step reads what each row has to read next (a token that was just
chosen, or the next piece of a new input) in one call per pass, whatever the rows' skills; new rows
enter and finished ones leave between two steps. A row sees its own slot alone, so that its answer
does not depend on what else is being served (promise 3).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Running, advance, choose
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.sampling import sample_stream
from shoulders.lm.steady import steady_logits
from shoulders.lm.together import mixed
from shoulders.serving.passes import Passes
from shoulders.serving.rows import Entry, Row

LOG = logging.getLogger("shoulders.serving")
PIECE = 256  # tokens of new inputs that one step reads: running rows wait no longer than that


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
        self._max_rows = max_rows
        self._wake = threading.Condition()
        self._inbox: deque[Entry] = deque()
        self._rows: list[Row] = []
        self.passes = Passes(lm, cache_bytes)
        self._closed = False
        self.tokens = self.steps = 0  # for metrics: new tokens, and steps that made them

    @property
    def load(self) -> int:
        """Rows that run or wait."""
        with self._wake:
            return len(self._rows) + sum(entry.rows * len(entry.every) for entry in self._inbox)

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
            entry, refused = self._inbox[0], None
            try:
                fits = self._fits(entry)
                if not fits and self._rows:
                    return  # others leave first
                if not fits:
                    raise ShouldersError("the request needs more memory than the server has")
                self._enter(entry)
            except Exception as error:  # it waits no more, and is no row yet: nobody else would say
                refused = error
            with self._wake:
                self._inbox.popleft()
            if refused is not None:
                _tell(entry, refused)

    def _enter(self, entry: Entry) -> None:
        """Make an entry a row, or no row at all; an ensemble's fellows are rows beside it."""
        rows: list[Row] = []
        try:
            for own in entry.every:
                rows.append(Row(own, self.passes.enter(own), list(own.ids), leads=own is entry))
        except Exception:
            for row in rows:
                self.passes.leave(row, [*self._rows, *rows])
            raise
        rows[0].fellows = tuple(rows[1:])
        self._rows += rows

    def _fits(self, entry: Entry) -> bool:
        rows = sum(1 if row.running else row.entry.rows for row in self._rows)
        rows += entry.rows * len(entry.every)
        if self._rows and rows > self._max_rows:
            return False
        if self.passes.fits(entry, self._rows):
            return True
        self.passes.trim(self._rows)
        return self.passes.fits(entry, self._rows)

    def _drop_cancelled(self) -> None:
        over = [row.entry for row in self._rows if row.entry.job.over and row.leads]
        for entry in {id(entry): entry for entry in over}.values():
            self._break(entry, ShouldersError("cancelled"))
        with self._wake:  # wherever they wait: nobody may be told late because another is long
            waiting = [entry for entry in self._inbox if entry.job.over]
            for entry in waiting:
                self._inbox.remove(entry)
        for entry in waiting:
            _tell(entry, ShouldersError("cancelled"))

    def _break(self, entry: Entry, error: Exception) -> None:
        """Let all rows of an entry go and say why; others go on."""
        for row in [row for row in self._rows if row.entry is entry and row.leads]:
            self._leave(row)
        _tell(entry, error)

    def _leave(self, row: Row) -> None:
        for one in row.every:
            self._rows.remove(one)
            self.passes.leave(one, self._rows)

    def _fail(self, error: Exception) -> None:
        entries = {id(row.entry): row.entry for row in self._rows}
        self._rows = []
        self.passes.clear()
        for entry in entries.values():
            _tell(entry, error)

    # -- a step --------------------------------------------------------------------------

    @torch.no_grad()
    def _step(self) -> None:
        """Read what every row has to read, and choose the next token of those that are through."""
        rows, pieces, left = [], [], PIECE
        for row in self._rows:
            count = len(row.pending)
            if count == 0:
                continue  # a member of an ensemble that waits for the others
            if row.running is None:
                if left <= 0:
                    continue
                # One position is read in another way than several, which rounds otherwise: an
                # input is never split into such a piece, so that it reads as if it were alone.
                count = min(count, max(2, left))
                count += len(row.pending) - count == 1
                left -= count
            rows.append(row)
            pieces.append(row.pending[:count])
        states = self.passes.read(rows, pieces)
        for row, piece, state in zip(rows, pieces, states, strict=True):
            row.pending = row.pending[len(piece) :]
            row.tokens += len(piece)
            row.state = None if row.pending else state[-1]
        through = [
            row
            for row in self._rows
            if row.leads and all(one.state is not None for one in row.every)
        ]
        if through:
            self._choose(through, self._logits(through))

    def _logits(self, through: Sequence[Row]) -> Tensor:
        """Return the logits of each row's next token, which an ensemble's rows choose together."""
        states = [one.state for row in through for one in row.every if one.state is not None]
        for row in through:
            for one in row.every:
                one.state = None
        together = len(states) > len(through)
        greedy = any(row.entry.ask.decoding.temperature == 0 for row in through)
        if not greedy:
            logits = self._lm.logits(torch.stack(states))
        else:
            logits = steady_logits(self._lm, torch.stack(states), every=together)
        if not together:
            return logits
        several = logits.split([len(row.every) for row in through])
        return torch.cat([mixed(own, len(own)) for own in several])

    def _choose(self, through: Sequence[Row], logits: Tensor) -> None:
        """Choose tokens; rows that have just read their input become as many as are wanted."""
        rows: list[Row] = []
        index: list[int] = []
        for i, row in enumerate(through):
            own = [row] if row.running else self._samples(row)
            rows += own
            index += [i] * len(own)
        running = [row.running for row in rows if row.running is not None]
        chosen = choose(self._lm, logits[torch.tensor(index)], running).tolist()
        self.tokens, self.steps = self.tokens + len(rows), self.steps + 1
        broken: set[int] = set()
        for row, state, token in zip(rows, running, chosen, strict=True):
            if id(row.entry) in broken:
                continue  # another sample of what has failed
            for one in row.every:
                one.pending = [token]
            try:
                if row.entry.take(advance(self._lm, state)):
                    self._leave(row)
            except Exception as error:  # of whoever is told: the others' answers go on
                broken.add(id(row.entry))
                self._break(row.entry, error)

    def _samples(self, row: Row) -> list[Row]:
        """Return the samples of a row that has read its input: they share what was read."""
        entry, config = row.entry, row.entry.ask.decoding
        room = self._lm.seen_whole + 1 - max(own.taken + len(own.ids) for own in entry.every)
        found = [row]
        copies = [self.passes.copy(one, config.n - 1) for one in row.every]
        for slots in zip(*copies, strict=True):
            own = [
                Row(one.entry, mine, [], one.tokens, leads=one.leads)
                for one, mine in zip(row.every, slots, strict=True)
            ]
            own[0].fellows = tuple(own[1:])
            found.append(own[0])
            self._rows += own
        for sample, leader in enumerate(found):
            random = sample_stream(config.seed, entry.ids, sample)
            most = min(config.max_new_tokens, room)
            for one in leader.every:
                one.running = Running(0, sample, config, random, most)
        return found


def _tell(entry: Entry, error: Exception) -> None:
    """Say why there is no answer; that whoever asked cannot be told is no harm to others."""
    try:
        entry.done(error)
    except Exception:
        LOG.exception("nobody could be told: %s", error)
