"""The loss: negative log-likelihood of answer tokens, and of nothing else (promise 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states


@dataclass(frozen=True, slots=True)
class Example:
    """One row ready to train on.

    Attributes:
        text: the input text, all that a producer may see.
        input_ids: tokens of the input with its separator.
        answer_ids: tokens of the answer with the end token; only these are counted.
        task: for averages by task.
    """

    text: str
    input_ids: list[int]
    answer_ids: list[int]
    task: str

    @property
    def read_ids(self) -> list[int]:
        """The tokens that the LM reads."""
        return self.input_ids + self.answer_ids[:-1]

    @property
    def tokens(self) -> int:
        """Tokens that the LM reads: the last answer token is only predicted."""
        return len(self.input_ids) + len(self.answer_ids) - 1


def answer_losses(
    lm: FrozenLM,
    prompt: Prompt,
    examples: Sequence[Example],
    embedded: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return each answer token's negative log-likelihood in nats, `[n]`, row after row.

    Logits are computed at the `n` answer positions only, as a 2-D product.

    Args:
        lm: the frozen LM.
        prompt: one per example.
        examples: rows of tokens.
        embedded: `[t, d]`, what stands for the tokens that are read (`Example.read_ids`), rows
            end to end; by default the LM's own embeddings of them.
        recompute: save memory, see `shoulders.lm.fused.Blocks.hidden`.
    """
    if embedded is None:
        embedded = lm.embed_rows([e.read_ids for e in examples])
    read = states(lm, prompt, embedded, [e.tokens for e in examples], recompute=recompute)
    places: list[int] = []
    for start, example in zip(read.starts, examples, strict=True):
        # The hidden state at the input's last token predicts the answer's first.
        first = start + len(example.input_ids) - 1
        places += range(first, first + len(example.answer_ids))
    chosen = read.values[torch.tensor(places, device=lm.device)]
    targets = torch.tensor([i for e in examples for i in e.answer_ids], device=lm.device)
    return lm.losses(chosen, targets)
