"""From requests to the engine and back: one job per prompt, its events in an asyncio queue."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.serving.engine import Engine
from shoulders.serving.job import Event, Job
from shoulders.serving.skillset import Served

Gone = Callable[[], Awaitable[bool]]
"""Tells whether whoever asked has left."""

POLL = 0.5  # seconds between two looks whether the client is still there


class Disconnected(ShouldersError):  # noqa: N818
    """Nobody waits for the answer any more."""


class TimedOutError(ShouldersError):
    """The request's time was over."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of choice `index`; `completion` is set when it has ended."""

    index: int
    text: str
    completion: Completion | None


class Answering:
    """The jobs of one request.

    Args:
        engine: answers them.
        served: the skill.
        inputs: one text, or row of token ids with the text they stand for, per job.
        decoding: how to answer.
        timeout: seconds after which the request is dropped, or None.
        seeded: whether the seed was asked for; without, every input draws with one of its own.

    Raises:
        ShouldersError: the skill gives one answer, and several are asked for; or the engine takes
            no more, or not so many.
    """

    def __init__(
        self,
        engine: Engine,
        served: Served,
        inputs: Sequence[tuple[str, list[int] | None]],
        decoding: DecodingConfig,
        timeout: float | None,
        *,
        seeded: bool = True,
    ) -> None:
        if len(inputs) > engine.most:
            raise ShouldersError(f"{len(inputs)} prompts: this server takes {engine.most} at once")
        before = served.skill.proposals
        if decoding.n > 1 and before is not None and before.config.chooser != "second_pass":
            raise ShouldersError(
                f"{served.name} chooses among its samples itself and has one answer: leave out n"
            )
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.started = time.monotonic()
        self.first: float | None = None
        self._deadline = deadline = None if timeout is None else self.started + timeout
        self._timeout, self._n = timeout, decoding.n
        self._expected = len(inputs) * decoding.n
        self.jobs: list[Job] = []
        try:
            for number, (text, ids) in enumerate(inputs):
                if not seeded:
                    decoding = decoding.model_copy(update={"seed": new_seed()})
                job = Job(served.name, served.answers, text, decoding, self._teller(number),
                          deadline, ids)  # fmt: skip
                engine.submit(job)
                self.jobs.append(job)
        except ShouldersError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Let the engine drop what is still running."""
        for job in self.jobs:
            job.cancelled.set()

    async def pieces(self, gone: Gone) -> AsyncGenerator[Piece, None]:
        """Yield pieces of all choices as they come; `gone` is asked every `POLL` seconds or so.

        Raises:
            Disconnected: the client has gone.
            TimedOutError: the deadline has passed.
            ShouldersError: what the engine could not do.
        """
        ended, look = 0, self.started + POLL
        try:
            while ended < self._expected:
                # Also while pieces come: a whole answer's client goes without a word.
                if time.monotonic() > look:
                    look = time.monotonic() + POLL
                    if await gone():
                        raise Disconnected("the client has gone")
                wait = POLL if self._deadline is None else self._deadline - time.monotonic()
                try:
                    number, event = await asyncio.wait_for(self._events.get(), min(POLL, wait))
                except TimeoutError:
                    self._in_time()
                    continue
                if isinstance(event, Exception):
                    self._in_time()
                    raise event
                self.first = self.first or time.monotonic()
                ended += event.completion is not None
                yield Piece(number * self._n + event.sample, event.text, event.completion)
        finally:
            self.cancel()

    def _in_time(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TimedOutError(f"not answered within {self._timeout:g} s")

    async def completions(self, gone: Gone) -> list[Completion]:
        """Return all choices, each finished; raises as `pieces` does."""
        found: dict[int, Completion] = {}
        async for piece in self.pieces(gone):
            if piece.completion is not None:
                found[piece.index] = piece.completion
        return [found[i] for i in range(self._expected)]

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the inputs."""
        return sum(job.prompt_tokens for job in self.jobs)

    @property
    def details(self) -> list[dict[str, Any]]:
        """What each job has found or proposed on the way."""
        return [job.details for job in self.jobs]

    def _teller(self, number: int) -> Any:
        def tell(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return tell


def new_seed() -> int:
    """Return a seed for a request that names none."""
    return secrets.randbits(63)
