"""Answers of a skill's last passes to inputs in tokens, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from shoulders.data.batching import evenly_grouped, length_grouped
from shoulders.lm.decode import Completion, DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import read_once
from shoulders.lm.streams import Streams, streams_for
from shoulders.skills.config import BATCH_ROWS, BATCH_TOKENS

if TYPE_CHECKING:
    from shoulders.skills.skill import Skill


def generated(
    skill: Skill,
    texts: Sequence[str],
    ids: Sequence[list[int]],
    decoding: DecodingConfig,
    on_rows: Callable[[int], None] | None = None,
    most: int = BATCH_ROWS,
) -> list[list[Completion]]:
    """Generate through the passes after the last text.

    Args:
        skill: whose passes are used; its text format is not.
        texts: what producers read, one for each row.
        ids: what stands before the answers.
        decoding: greedy or sampled, and how long.
        on_rows: told of each batch's rows.
        most: samples that are generated together.

    Raises:
        WindowError: a row does not fit.
    """

    prompts = Prompts(skill)

    def one(rows: list[int]) -> list[list[Completion]]:
        own = [texts[i] for i in rows]
        with torch.no_grad():
            prompt, source = prompts(own), skill.source(own)
        return generate(skill.lm, prompt, [ids[i] for i in rows], decoding, source)

    return batched(skill.lm, [len(i) for i in ids], decoding, one, on_rows, most)


class Prompts:
    """A skill's prompts, batch after batch: one that never changes is read by the LM once."""

    def __init__(self, skill: Skill) -> None:
        self._skill = skill
        self._constant: Prompt | None = None

    def __call__(self, texts: Sequence[str]) -> Prompt:
        """Return the last pass's prompts for `b` texts, as `Skill.prompt` does."""
        if self._constant is None:
            prompt = self._skill.prompt(texts)
            if not prompt.shared:
                return prompt
            # Streams that come here together read it each, to the same bits.
            self._constant = read_once(self._skill.lm, self._skill.prompt(texts[:1]))
        return self._constant.repeated(len(texts))


def batched(
    lm: FrozenLM,
    lengths: Sequence[int],
    decoding: DecodingConfig,
    one: Callable[[list[int]], list[list[Completion]]],
    on_rows: Callable[[int], None] | None = None,
    most: int = BATCH_ROWS,
    tokens: int = BATCH_TOKENS,
) -> list[list[Completion]]:
    """Answer rows of such `lengths` in batches of similar ones; `one` answers the rows it is given.

    `tokens` are read together at most; see `generated` for the others.
    """
    results: list[list[Completion]] = [[] for _ in lengths]
    limits = lengths, tokens, max(1, most // decoding.n)
    batches = length_grouped(*limits)
    if len(batches) > 1 and lm.blocks is not None:
        batches = evenly_grouped(*limits, streams_for(lm), decoding.max_new_tokens)
    with Streams.of(lm, None if len(batches) > 1 else 1) as streams:
        for rows, answers in zip(batches, streams.map(one, batches), strict=True):
            for row, several in zip(rows, answers, strict=True):
                results[row] = several
            if on_rows is not None:
                on_rows(len(rows))
    return results
