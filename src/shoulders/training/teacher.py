"""A teacher: an LM that says what it expects at every answer token, for a producer to learn.

Knowledge distillation (Hinton et al., arXiv 1503.02531): a copy of the frozen LM that was tuned, or
a larger one of its family, gives a distribution where a row gives one token. The teacher reads the
row's own tokens, without a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from shoulders.errors import TrainingError
from shoulders.fingerprint import tokenizer_digest
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.training.configs import TeacherConfig
from shoulders.training.objective import Example, Lesson, answer_states


class Teacher:
    """An LM that teaches.

    Args:
        lm: the teacher.
        weight: how much its distribution counts beside the answer.
        top: how many tokens of each are looked at.
        known: the first so many of its tokens are; by default all.
    """

    def __init__(self, lm: FrozenLM, weight: float, top: int, known: int | None = None) -> None:
        self.lm, self._weight = lm, weight
        self._known = known or lm.vocab_size
        self._top = min(top, self._known)

    @classmethod
    def of(cls, config: TeacherConfig, taught: FrozenLM) -> Teacher:
        """Load a teacher for what is trained around the LM `taught`.

        Raises:
            LMError: it cannot be loaded.
            TrainingError: its tokens are not those of `taught`.
        """
        lm = load_lm(**config.lm.model_dump())
        if tokenizer_digest(lm.tokenizer) != tokenizer_digest(taught.tokenizer):
            raise TrainingError(
                f"training.teacher: {lm.name} has another tokenizer than {taught.name}, so that "
                "its tokens mean something else: take an LM of the same family"
            )
        if lm.max_positions < taught.max_positions:
            raise TrainingError(
                f"training.teacher: the window of {lm.name}, {lm.max_positions}, is shorter than "
                f"that of {taught.name}, {taught.max_positions}: it could not read every row"
            )
        # Heads may have rows beyond the tokens, more of them in larger LMs of a family.
        return cls(lm, config.weight, config.top, min(lm.vocab_size, taught.vocab_size))

    @torch.no_grad()
    def teach(self, examples: Sequence[Example]) -> list[Example]:
        """Return the examples with a lesson each."""
        hidden = answer_states(self.lm, Prompt.empty(len(examples)), examples)
        top = self.lm.logits(hidden)[:, : self._known].topk(self._top, dim=1)
        # Of what it holds likeliest, all of it: the rest is too little to matter, or `top` too few.
        probabilities = top.values.softmax(1)
        counts = [len(e.answer_ids) for e in examples]
        pairs = zip(top.indices.split(counts), probabilities.split(counts), strict=True)
        return [
            replace(example, lesson=Lesson(ids, values, self._weight))
            for example, (ids, values) in zip(examples, pairs, strict=True)
        ]
