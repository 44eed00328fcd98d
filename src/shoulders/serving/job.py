"""What is asked of the engine, and how it comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.reader.questions import Question
from shoulders.recursion.candidates import chosen
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.framing import Unprefixed
from shoulders.skills.proposals import Gathering, Proposed, Wanted
from shoulders.skills.reader import Reader
from shoulders.skills.skill import Skill

Event = Delta | Exception
"""A piece of an answer, or why there is none."""


@dataclass(slots=True)
class Ask:
    """One stage of a job: a text through the last passes of a skill.

    Attributes:
        skill: without proposals of its own.
        others: of an ensemble, its other members, which choose each token with the skill.
        text: its input.
        decoding: how to answer.
        shown: whether its pieces of text are the job's answer.
        ids: see `Job`.
    """

    skill: Skill
    text: str
    decoding: DecodingConfig
    shown: bool
    ids: list[int] | None = None
    others: tuple[Skill, ...] = ()
    unprefixed: Unprefixed = field(init=False)

    def __post_init__(self) -> None:
        prefix = self.skill.config.format.answer_prefix
        self.decoding = self.decoding.behind(prefix)
        self.unprefixed = Unprefixed(prefix)


@dataclass(slots=True)
class Job:
    """A request for `decoding.n` answers to one text.

    Attributes:
        name: of the skill, for metrics.
        served: what answers.
        text: the input.
        decoding: how to answer.
        on_event: told of every piece of text, from the engine's threads.
        deadline: `time.monotonic()` after which it is dropped, or None.
        ids: the text's tokens where they are not what the skill makes of it (a conversation in
            the LM's own template).
        prompt_tokens: of its inputs, every member's of an ensemble, for usage counts.
        details: what was found or proposed on the way, for those who look inside: `found`,
            `passages`, `candidates`, `chooser`, and the texts that came to be `read` instead of
            the input, one for each stage, in order.
    """

    name: str
    served: Skill | Reader | Ensemble
    text: str
    decoding: DecodingConfig
    on_event: Callable[[Event], None]
    deadline: float | None = None
    ids: list[int] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_tokens: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.cancelled.is_set() or late


Plan = Generator[list[Ask], list[list[Completion]], None]
"""The stages of a job: asks that are answered side by side; it is sent their completions."""


def plan(job: Job) -> Plan:
    """Return the stages of a job: proposals before answers, passages before questions."""
    skill, text = job.served, job.text
    if isinstance(skill, Ensemble):
        first, *others = skill.members
        yield [Ask(first, text, job.decoding, True, others=tuple(others))]
        return
    if isinstance(skill, Reader):
        text = _passages_before(job, skill)
        skill = skill.skill
    yield from _answers(job, [Wanted(skill, text, job.decoding)], shown=True)


def _answers(
    job: Job, wanted: Sequence[Wanted], *, shown: bool
) -> Generator[list[Ask], list[list[Completion]], list[list[Completion]]]:
    """Let passes before a text propose, then ask those after it; return what the last ones say."""
    asks = []
    for skill, text, decoding in wanted:
        if skill.proposals is not None:
            before, last = skill.proposals, skill.last
            gathering = before.gather(text, last, before.room(last))
            found = yield from _gathered(job, gathering)
            job.details["candidates"] = [
                {
                    "text": c.text,
                    "count": c.count,
                    "logprob": c.logprob,
                    "shown": c not in found.left_out,
                }
                for c in found.candidates
            ]
            job.details["chooser"] = chooser = skill.proposals.config.chooser
            if chooser != "second_pass":
                said = chosen(found.candidates, chooser)
                if shown:
                    ended = Completion(said.text, [], said.logprob, "stop")
                    job.on_event(Delta(0, 0, said.text, ended))
                return [[Completion(said.text, [], said.logprob, "stop")]]
            text, skill = found.text, skill.last
            job.details.setdefault("read", []).append(text)
        asks.append(Ask(skill, text, decoding, shown, job.ids if text == job.text else None))
    answers = yield asks
    return answers


def _gathered(
    job: Job, gathering: Gathering
) -> Generator[list[Ask], list[list[Completion]], Proposed]:
    wanted = next(gathering)
    while True:
        answers = yield from _answers(job, wanted, shown=False)
        try:
            wanted = gathering.send(answers)
        except StopIteration as stop:
            found: Proposed = stop.value
            return found


def _passages_before(job: Job, reader: Reader) -> str:
    """Return the packed context of a reader's question, and note what was found."""
    question = Question(job.text, ())
    ranked = reader.contexts.ranked([question])
    (packed,) = reader.packed([question], ranked)
    (found,) = ranked
    scores = dict(zip((p.id for p in found.passages), found.scores, strict=True))
    first = {p.id: place for place, p in enumerate(found.retrieved, 1)}
    first_scores = dict(zip((p.id for p in found.retrieved), found.retrieved_scores, strict=True))
    parts = {p.id: "whole" for p in packed.used}
    if packed.cut:
        parts[packed.used[-1].id] = "cut"
    job.details["passages"] = [
        {"id": p.id, "title": p.title, "text": p.text, "score": scores.get(p.id)}
        for p in packed.used
    ]
    # Questions that bring their own passages bring no retriever's scores.
    job.details["found"] = [
        {
            "id": p.id,
            "title": p.title,
            "text": p.text,
            "retrieved": first[p.id],
            "retrieved_score": first_scores.get(p.id),
            "ranked": place,
            "score": scores[p.id],
            "read": parts.get(p.id),
        }
        for place, p in enumerate(found.passages, 1)
    ]
    job.details["read"] = [packed.text]
    return packed.text
