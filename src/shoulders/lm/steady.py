"""Logits of a row that do not depend on how many rows stand beside it.

Matrix libraries multiply a few rows in other ways than many, and sum in other orders: the last bits
of a row's logits then tell how many others there were. Where two tokens are as likely as each other
to those bits, the greedy answer would too (promise 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoulders.lm.frozen import FrozenLM

# From so many rows on a row's sums are the same, whatever their number: seen with MKL in float32.
MANY = 16
# Fewer than this are cheaper to multiply as they are; only what is nearly level is done again.
FEW = 8
NEAR = 1e-3  # of logits: hundreds of times what the order of sums changes


@torch.no_grad()
def steady_logits(lm: FrozenLM, hidden: Tensor, *, every: bool = False) -> Tensor:
    """Return float32 logits `[n, vocabulary]` of hidden states `[n, d]`, to choose tokens by.

    Their greedy choice is that of any larger batch. In lower precisions, and on other devices, they
    are `lm.logits`: there the states differ with the batch already. With `every` all of them are
    the same to the last bit: an ensemble chooses from a mean, where others are level than here.
    """
    n = len(hidden)
    if n >= MANY or hidden.dtype != torch.float32 or hidden.device.type != "cpu":
        return lm.logits(hidden)
    if n >= FEW or every:
        return _beside_zeros(lm, hidden)
    logits = lm.logits(hidden)
    first, second = logits.topk(2, -1).values.unbind(-1)
    level = first - second < NEAR
    if level.any():
        logits[level] = _beside_zeros(lm, hidden[level])
    return logits


def _beside_zeros(lm: FrozenLM, hidden: Tensor) -> Tensor:
    zeros = hidden.new_zeros(MANY - len(hidden), hidden.shape[1])
    return lm.logits(torch.cat([hidden, zeros]))[: len(hidden)]
