"""The loss: negative log-likelihood of answer tokens, and of nothing else (promise 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.combine import Combined, check_window, combine
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.fused import Pack
from shoulders.lm.pack import Packed, can_pack, pack
from shoulders.lm.prompt import Prompt


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
    def tokens(self) -> int:
        """Tokens that the LM reads: the last answer token is only predicted."""
        return len(self.input_ids) + len(self.answer_ids) - 1


def answer_losses(
    lm: FrozenLM,
    prompt: Prompt,
    examples: Sequence[Example],
    *,
    recompute: bool = False,
) -> Tensor:
    """Return each answer token's negative log-likelihood in nats, `[n]`, row after row.

    Logits are computed at the `n` answer positions only, as a 2-D product. `recompute` saves
    memory, see `shoulders.lm.fused.Blocks.hidden`.
    """
    ids = [e.input_ids + e.answer_ids[:-1] for e in examples]
    batch: Pack | Packed | Combined
    if lm.blocks is not None and lm.blocks.fits(prompt) and can_pack(lm, prompt, ids):
        check_window(lm, prompt, np.array([len(row) for row in ids]))
        batch = lm.blocks.pack(lm.embed, prompt, ids)
        hidden = lm.blocks.hidden(batch, recompute=recompute)[None]
    else:
        batch = pack(lm, prompt, ids) if can_pack(lm, prompt, ids) else combine(lm, prompt, ids)
        hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
    rows: list[int] = []
    places: list[int] = []
    for row, example in enumerate(examples):
        # The hidden state at the input's last token predicts the answer's first.
        start = int(batch.first_token[row]) + len(example.input_ids) - 1
        rows += [row if len(hidden) > 1 else 0] * len(example.answer_ids)
        places += range(start, start + len(example.answer_ids))
    chosen = hidden[torch.tensor(rows), torch.tensor(places)]
    targets = torch.tensor([i for e in examples for i in e.answer_ids], device=lm.device)
    return torch.nn.functional.cross_entropy(lm.logits(chosen), targets, reduction="none")
