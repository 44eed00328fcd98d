"""Many texts through an engine at once, as one call: what servers do request by request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.score import Score
from shoulders.serving.engine import Engine
from shoulders.serving.job import Event, Job
from shoulders.skills.skill import Skill

AT_ONCE = 128  # jobs that wait or run: an engine's queue takes more


class Asking:
    """A skill whose answers come through an engine; likelihoods are computed here.

    Args:
        engine: answers, here or in a vLLM server.
        skill: what is asked.
    """

    def __init__(self, engine: Engine, skill: Skill) -> None:
        self._engine, self._skill = engine, skill

    def generate(
        self,
        texts: Sequence[str],
        decoding: DecodingConfig,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Answer every text, as `Skill.generate` does; raises what the first failing job met."""
        proposals = self._skill.proposals
        chooses = proposals is not None and proposals.config.chooser != "second_pass"
        wanted = 1 if chooses else decoding.n
        found: list[dict[int, Completion]] = [{} for _ in texts]
        failed: list[Exception] = []
        places = threading.Semaphore(AT_ONCE)
        ended = threading.Semaphore(0)
        jobs: list[Job] = []

        def teller(number: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                if isinstance(event, Exception):
                    failed.append(event)
                elif event.completion is None:
                    return
                else:
                    found[number][event.sample] = event.completion
                    if len(found[number]) < wanted:
                        return
                places.release()
                ended.release()

            return tell

        def wait(count: int) -> None:
            for _ in range(count):
                ended.acquire()
                if failed:
                    raise failed[0]
                if on_rows is not None:
                    on_rows(1)

        try:
            told = 0
            for number, text in enumerate(texts):
                if not places.acquire(blocking=False):
                    wait(1)
                    told += 1
                    places.acquire()
                jobs.append(Job("asking", self._skill, text, decoding, teller(number)))
                self._engine.submit(jobs[-1])
            wait(len(texts) - told)
        finally:
            for job in jobs:
                job.cancelled.set()
        return [[own[k] for k in range(wanted)] for own in found]

    def score(self, texts: Sequence[str], answers: Sequence[Sequence[str]]) -> list[list[Score]]:
        """Return log-likelihoods, see `Skill.score`: engines give none of given answers."""
        return self._skill.score(texts, answers)
