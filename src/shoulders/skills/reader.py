"""`Reader`: passages are found and packed before the question, and the frozen LM reads.

Section "frozen readers" of arXiv 2204.10019: nothing is trained but a prompt (and a re-ranker), and
the LM's window is filled with the passages most likely to hold the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from shoulders.errors import placed
from shoulders.lm.decode import Completion, DecodingConfig, Delta
from shoulders.reader.contexts import Contexts, Ranked
from shoulders.reader.packer import PackConfig, Packed, pack
from shoulders.reader.questions import Question
from shoulders.skills.skill import Skill

NO_ANSWER = "no answer in these documents"


class Confidence(BaseModel):
    """How likely an answer is right: a logistic model of two figures of it, fitted on validation.

    `probability = sigmoid(bias + answer * mean log-probability of the answer's tokens + passage *
    score of the best passage)`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bias: float
    answer: float
    passage: float = 0.0

    def of(self, logprob: float, best: float) -> float:
        """Return the probability that an answer is right."""
        value = self.bias + self.answer * logprob + self.passage * best
        return 1 / (1 + math.exp(-max(-500.0, min(500.0, value))))


class ReadingConfig(BaseModel):
    """How a reader reads.

    Attributes:
        pack: how passages are packed before the question.
        max_new_tokens: longest answer; so much of the window is kept free for it.
        confidence: None where it was not calibrated.
        abstain_below: answers less likely to be right than this are withheld.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pack: PackConfig = PackConfig()
    max_new_tokens: int = Field(default=32, ge=1)
    confidence: Confidence | None = None
    abstain_below: float | None = Field(default=None, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what it rests on.

    Attributes:
        text: the answer's first line, or `NO_ANSWER` where the reader abstains.
        proposed: what it would have said.
        abstained: whether it does.
        confidence: calibrated probability that the answer is right; None where not calibrated.
        logprob: of the answer's tokens, on average.
        best: score of the best passage; 0 where none was found.
        ranked: every passage that was found.
        packed: what the LM has read.
    """

    text: str
    proposed: str
    abstained: bool
    confidence: float | None
    logprob: float
    best: float
    ranked: Ranked
    packed: Packed


class Reader:
    """A skill that reads what is found for a question.

    Args:
        skill: the frozen LM with its prompt; trained or not.
        contexts: finds and orders passages.
        config: how to read.
    """

    def __init__(self, skill: Skill, contexts: Contexts, config: ReadingConfig) -> None:
        self.skill, self.contexts, self.config = skill, contexts, config

    def packed(self, questions: Sequence[Question], ranked: Sequence[Ranked]) -> list[Packed]:
        """Pack each question's passages as the LM reads them.

        Raises `WindowError` for a question that alone does not fit.
        """
        room = self.skill.input_room(self.config.max_new_tokens)
        count = self.skill.count_tokens
        with placed([q.question for q in questions], [q.where for q in questions]):
            return [
                pack(q.question, found.passages, self.config.pack, count, room)
                for q, found in zip(questions, ranked, strict=True)
            ]

    def answer(
        self,
        questions: Sequence[Question],
        ranked: Sequence[Ranked] | None = None,
        *,
        on_rows: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """Answer every question, greedily.

        Args:
            questions: what to answer.
            ranked: their passages, where they have been found already.
            on_rows: told of each finished batch of answers.
        """
        ranked = self.contexts.ranked(questions) if ranked is None else ranked
        packed = self.packed(questions, ranked)
        completions = self.skill.generate(
            [p.text for p in packed], self.decoding(), on_rows=on_rows
        )
        both = zip(completions, ranked, packed, strict=True)
        return [self.judged(several[0], found, own) for several, found, own in both]

    def stream(self, packed: Packed) -> Iterator[Delta]:
        """Answer one packed question, yielding text as it becomes certain."""
        return self.skill.stream(packed.text, self.decoding())

    def judged(self, completion: Completion, ranked: Ranked, packed: Packed) -> Answer:
        """Return the answer of a completion, or none where it is too unlikely to be right."""
        logprob = completion.logprob / max(1, len(completion.token_ids))
        best = ranked.scores[0] if ranked.scores else 0.0
        calibrated = self.config.confidence
        confidence = calibrated.of(logprob, best) if calibrated else None
        least = self.config.abstain_below
        abstained = least is not None and confidence is not None and confidence < least
        said = first_line(completion.text)
        text = NO_ANSWER if abstained else said
        return Answer(text, said, abstained, confidence, logprob, best, ranked, packed)

    def decoding(self) -> DecodingConfig:
        """Return how answers are written."""
        return DecodingConfig(max_new_tokens=self.config.max_new_tokens)


def first_line(text: str) -> str:
    """Return the first line that is not blank, which is the answer.

    An untrained LM often starts on a new line, and goes on to lines of its own invention:
    cutting at the first line break would score its format, not its answer.
    """
    return text.strip().split("\n", 1)[0].strip()
