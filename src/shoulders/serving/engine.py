"""The engine: jobs in, pieces of text out; preparation beside decoding, workers side by side."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from pydantic import BaseModel, ConfigDict, Field

from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.decode import Completion
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.lent import is_quantised
from shoulders.lm.streams import MOST
from shoulders.recursion.chain import Hop
from shoulders.serving.job import Ask, Job, Plan, plan
from shoulders.serving.remote import Remote
from shoulders.serving.rows import Entry
from shoulders.serving.worker import Worker
from shoulders.serving.written import WrittenPrompts
from shoulders.skills.skill import Skill


class QueueFullError(ShouldersError):
    """There are as many jobs as the engine takes at once; ask again later."""


class EngineConfig(BaseModel):
    """How much the engine does at once.

    Attributes:
        workers: threads that decode, each on its share of the processor; None: one for each of
            the processor's, four at most.
        max_rows: rows that one worker decodes together.
        max_queue: jobs that run or wait; one more is refused.
        cache_bytes: most memory for keys/values, of all workers; while room is made for a row that
            joins, what was there and its copy lie side by side for a moment.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int | None = Field(default=None, ge=1)
    max_rows: int = Field(default=64, ge=1)
    max_queue: int = Field(default=256, ge=1)
    cache_bytes: int = Field(default=2 << 30, ge=1 << 20)


class Engine:
    """Answers jobs of any skills of one frozen LM, mixed in one batch.

    Args:
        lm: a Llama-style LM on a CPU (its layers fused, see `shoulders.lm.fused`).
        config: how much at once.
        remote: answers what it can in this engine's place. The LM may then be of any kind: what the
            remote engine cannot answer is refused where the LM's layers are not fused.

    Raises:
        ShouldersError: the LM's layers are not fused, and there is no remote engine.
    """

    def __init__(
        self,
        lm: FrozenLM,
        config: EngineConfig | None = None,
        remote: Remote | None = None,
    ) -> None:
        config = config or EngineConfig()
        if lm.blocks is None and remote is None:
            raise ShouldersError(f"{lm.name}: {_unserved(lm)}; or use --engine vllm")
        self.lm, self.most, self._remote = lm, config.max_queue, remote
        threads = torch.get_num_threads()
        count = (config.workers or min(threads, MOST)) if lm.blocks is not None else 0
        self._workers = [
            Worker(
                lm,
                i,
                threads=max(1, threads // count),
                cache_bytes=config.cache_bytes // count,
                max_rows=config.max_rows,
            )
            for i in range(count)
        ]
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._prompts = WrittenPrompts(lm)
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._jobs = 0
        for worker in self._workers:
            worker.start()

    # -- facts ---------------------------------------------------------------------------

    @property
    def jobs(self) -> int:
        """Jobs that run or wait."""
        return self._jobs

    @property
    def running(self) -> int:
        """Rows that are being decoded."""
        away = self._remote.running if self._remote else 0
        return away + sum(worker.running for worker in self._workers)

    @property
    def tokens(self) -> int:
        """New tokens since the start."""
        away = self._remote.tokens if self._remote else 0
        return away + sum(worker.tokens for worker in self._workers)

    @property
    def steps(self) -> int:
        """Decode steps of this process since the start."""
        return sum(worker.steps for worker in self._workers)

    @property
    def fill(self) -> float:
        """Mean rows in a decode step of this process; 0 before the first."""
        own = sum(worker.tokens for worker in self._workers)
        return own / self.steps if self.steps else 0.0

    def healthy(self) -> bool:
        """Tell whether requests can be answered: a remote engine has to be there."""
        return self._remote is None or self._remote.healthy()

    # -- jobs ----------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a job; its events come from other threads, the last is a completion or an error.

        Raises:
            QueueFullError: there are as many jobs as the engine takes.
        """
        with self._lock:
            if self._jobs >= self.most:
                raise QueueFullError(f"{self._jobs} requests are waiting; try again later")
            self._jobs += 1
        self._later(job, self._begin, job)

    def close(self, timeout: float | None = None) -> bool:
        """Finish what is running, then stop; tell whether all was finished in time."""
        with self._idle:
            finished = self._idle.wait_for(lambda: self._jobs == 0, timeout)
        self._preparing.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        if self._remote is not None:
            self._remote.close()
        return finished

    def _later(self, job: Job, prepare: Callable[..., None], *given: object) -> None:
        """Prepare something beside decoding; a job that is not come to any more is told so."""

        def stopped() -> None:
            self._end()
            job.on_event(ShouldersError("the server was stopped before all was answered"))

        try:
            future = self._preparing.submit(prepare, *given)
        except RuntimeError:  # closed, and its time was over; what was shown has been told
            stopped()
            return
        future.add_done_callback(lambda done: stopped() if done.cancelled() else None)

    def _begin(self, job: Job) -> None:
        self._continue(job, plan(job), None)

    def _continue(self, job: Job, stages: Plan, answers: list[list[Completion]] | None) -> None:
        """Take a job to its next stage, or to its end."""
        try:
            if job.over:
                raise ShouldersError("cancelled")
            asks = stages.send(answers)  # type: ignore[arg-type]
            for entry in self._entries(job, asks, stages):
                if self._remote is not None and not entry.here:
                    self._remote.give(entry)
                else:
                    min(self._workers, key=lambda worker: worker.load).give(entry)
        except StopIteration:
            self._end()
        except Exception as error:  # whoever waits for the job must hear of it
            self._end()
            job.on_event(error)

    def _entries(self, job: Job, asks: Sequence[Ask], stages: Plan) -> list[Entry]:
        """Prepare asks; when the last of them is answered the job goes on."""
        answers: dict[int, list[Completion]] = {}
        failed = threading.Event()
        lock = threading.Lock()

        def done(number: int, result: list[Completion] | Exception) -> None:
            with lock:
                # A remote engine may break off what it has just told the end of.
                if failed.is_set() or number in answers:
                    return
                if isinstance(result, Exception):
                    failed.set()
                else:
                    answers[number] = result
                    if len(answers) < len(asks):
                        return
            if isinstance(result, Exception):
                self._end()
                job.on_event(result)
                return
            every = [answers[i] for i in range(len(asks))]
            self._later(job, self._continue, job, stages, every)

        entries = []
        for number, ask in enumerate(asks):
            skill = ask.skill
            ids = ask.ids or skill.asking_ids([ask.text], ask.decoding)[0]
            self._check(ids)
            prompt = None
            here = self._remote is None or bool(skill.parts.earlier or ask.others)
            if self._remote is not None and not here:
                prompt = self._prompts.of(skill, -1, ask.text, read=False)
                here = not self._remote.takes(prompt)
            if here and not self._workers:
                raise ShouldersError(
                    f"{job.name}: the vLLM server cannot answer skills of this kind, and the local "
                    "engine serves Llama-style LMs on CPUs alone"
                )
            if prompt is None:
                prompt = self._prompts.of(skill, -1, ask.text, read=True)
            hops = [
                Hop(self._prompts.of(skill, i, ask.text, read=True), earlier.link)
                for i, earlier in enumerate(skill.parts.earlier)
            ]
            if ask.shown:
                job.prompt_tokens += len(ids)
            told = functools.partial(done, number)
            fellows = tuple(self._fellow(job, ask, other) for other in ask.others)
            entry = Entry(job, ask, ids, prompt, hops, told, here, fellows)
            if here:
                self._check_seen(entry)
            entries.append(entry)
        return entries

    def _check(self, ids: Sequence[int]) -> None:
        """Raise `WindowError` for an input that the LM cannot read, which it does not name.

        A folder's path is nobody's business but the server's.
        """
        if not 0 < len(ids) <= self.lm.max_positions:
            raise WindowError(f"the input has {len(ids)} tokens, {self.lm.max_positions} fit")

    def _check_seen(self, entry: Entry) -> None:
        """Raise `WindowError` where layers with a sliding window would not see all of an input.

        Fused layers see everything, which would not be what the LM computes.
        """
        longest = max(own.taken + len(own.ids) for own in entry.every)
        if self.lm.sliding_window and longest > self.lm.seen_whole:
            raise WindowError(
                f"the input and its prompt have {longest} positions; the local engine serves the "
                f"{self.lm.seen_whole} that this LM's sliding layers see"
            )

    def _fellow(self, job: Job, ask: Ask, skill: Skill) -> Entry:
        """Prepare what another member of an ensemble reads; its first member's entry answers."""
        ids = skill.asking_ids([ask.text], ask.decoding)[0]
        self._check(ids)
        if ask.shown:
            job.prompt_tokens += len(ids)
        prompt = self._prompts.of(skill, -1, ask.text, read=True)
        return Entry(job, ask, ids, prompt, [], lambda _: None)

    def _end(self) -> None:
        with self._idle:
            self._jobs -= 1
            self._idle.notify_all()


def _unserved(lm: FrozenLM) -> str:
    if lm.quantize is not None:
        return f"held in {lm.quantize}, and the local engine serves plain LMs: --quantize none"
    if is_quantised(lm.model):
        return "its weights are quantised, and the local engine serves plain LMs"
    if lm.device.type != "cpu":
        return (
            f"lies on {lm.device}, and the local engine serves on CPUs: --dtype int8 keeps it there"
        )
    return "the local engine serves LMs with Llama's layers (Llama, Mistral, Qwen2, SmolLM2)"
