"""Textual recursion's middle: what a first pass has proposed, as text for a second one.

A pass samples `n` answers; equal ones are merged, counted and put beside the question, and the same
frozen LM reads both with another prompt (arXiv 2204.10019, section on recursive LMs). With `rounds`
and `subset` the second pass's own samples become the next round's proposals, each from a few of
the last (recursive self-aggregation, arXiv 2509.26626).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig

Chooser = Literal["second_pass", "majority", "likeliest"]


_APART = 1_000_003  # between the seeds of a round's samples: more than there are rounds


class ProposeConfig(BaseModel):
    """How a pass proposes answers, and how they are shown to the next one.

    Attributes:
        n: samples for every input; they share one prefill.
        temperature, top_p, max_new_tokens, seed: of sampling, see `DecodingConfig`.
        show: most candidates that are shown, the likeliest ones; None shows all.
        counts: say how often each was sampled.
        before, between: text before the first candidate and between two of them.
        place: candidates stand `behind` the input or `ahead` of it: then what the answer follows is
            the input, as in a pass without candidates.
        after: text between the last candidate and the input, where they stand ahead; one that
            inputs do not have, for `prompt_from`.
        rounds: how often the second pass answers; all but the last time with `n` samples, which
            are the next round's candidates.
        subset: candidates that each sample of such a round sees; None shows it all.
        chooser: `second_pass` reads the candidates; `majority` (self-consistency, arXiv
            2203.11171) and `likeliest` take one of them as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int = Field(default=8, ge=1)
    temperature: float = Field(default=0.8, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=24, ge=1)
    seed: int = Field(default=0, ge=0)
    show: int | None = Field(default=None, ge=1)
    counts: bool = True
    before: str = "\nCandidates: "
    between: str = " | "
    place: Literal["behind", "ahead"] = "behind"
    after: str = "\n\n"
    rounds: int = Field(default=1, ge=1)
    subset: int | None = Field(default=None, ge=1)
    chooser: Chooser = "second_pass"

    @model_validator(mode="after")
    def _different(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"n is {self.n} at temperature 0: all samples would be the same")
        return self

    def decoding(self, round_number: int = 0, sample: int = 0) -> DecodingConfig:
        """Return how to sample: `n` answers, or one sample of a further round.

        Those of a round may read the same text, so that each draws with a seed of its own.
        """
        return DecodingConfig(
            n=1 if round_number else self.n,
            temperature=self.temperature,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed + round_number + _APART * sample,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposed answer, how many samples gave it, and its mean log-probability per token."""

    text: str
    count: int
    logprob: float


def merged(samples: Sequence[Completion]) -> list[Candidate]:
    """Merge equal answers (first lines, without surrounding space), the most frequent first.

    Of equally frequent ones the likeliest comes first. There are none where no sample says
    anything: the next pass then reads the input as it is.
    """
    found: dict[str, list[float]] = {}
    for sample in samples:
        lines = sample.text.strip().splitlines()
        if lines and (text := lines[0].strip()):
            found.setdefault(text, []).append(sample.logprob / max(1, len(sample.token_ids)))
    every = [Candidate(text, len(l), sum(l) / len(l)) for text, l in found.items()]  # noqa: E741
    return sorted(every, key=lambda c: (-c.count, -c.logprob, c.text))


@dataclass(frozen=True, slots=True)
class Shown:
    """The text that the second pass reads, and the candidates that did not fit it."""

    text: str
    left_out: tuple[Candidate, ...]


def shown(
    text: str,
    candidates: Sequence[Candidate],
    config: ProposeConfig,
    count_tokens: Callable[[str], int],
    room: int,
    order: np.random.Generator | None = None,
) -> Shown:
    """Put candidates behind an input, or ahead of it.

    Those that do not fit `room` tokens are dropped, the least likely first; the input never is.

    Args:
        text: the input.
        candidates: the likeliest first, as `merged` returns them.
        config: how to show them.
        count_tokens: tokens of a text.
        room: tokens that the second pass has for its input.
        order: shuffles what is shown, as in training; None keeps the likeliest first.
    """
    kept = list(candidates[: config.show])
    while True:
        listed = [kept[i] for i in order.permutation(len(kept))] if order is not None else kept
        line = config.between.join(
            f"{c.text} ({c.count})" if config.counts else c.text for c in listed
        )
        ahead = f"{config.before}{line}{config.after}{text}"
        whole = ahead if config.place == "ahead" else f"{text}{config.before}{line}"
        whole = whole if listed else text
        if not kept or count_tokens(whole) <= room:
            return Shown(whole, tuple(c for c in candidates if c not in kept))
        kept.pop()


def check_some(proposed: Iterable[Sequence[Candidate]]) -> None:
    """Raise `ShouldersError` where no input has any candidate: the first pass says nothing."""
    every = list(proposed)
    if every and not any(every):
        raise ShouldersError(
            "no sample of the first pass says anything, so that there are no candidates; sample "
            "more of them, or train the first pass longer"
        )


def chosen(candidates: Sequence[Candidate], chooser: Chooser) -> Candidate:
    """Return the candidate that a chooser without a second pass takes; an empty one of none."""
    if not candidates:
        return Candidate("", 0, 0.0)
    if chooser == "likeliest":
        return max(candidates, key=lambda c: (c.logprob, c.count, c.text))
    return candidates[0]  # merged: the most frequent, then the likeliest


def subsets(text: str, count: int, config: ProposeConfig, round_number: int) -> list[list[int]]:
    """Return, for each of `n` samples of a further round, which of `count` candidates it sees.

    Drawn from the input's own text, so that they do not depend on the batch.
    """
    size = min(config.subset or count, count)
    random = stream_of(text, config.seed, round_number)
    return [sorted(random.choice(count, size, replace=False).tolist()) for _ in range(config.n)]


def stream_of(text: str, *numbers: int) -> np.random.Generator:
    """Return a random stream that depends on a text and some numbers only."""
    content = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint32)
    return np.random.default_rng([*numbers, *content.tolist()])
