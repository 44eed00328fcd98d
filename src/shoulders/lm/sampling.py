"""From logits to next tokens: greedy, temperature, top-p; one random stream per sample."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.kernels import available


def sample_stream(seed: int, ids: Sequence[int], sample: int) -> np.random.Generator:
    """Return the random stream of one sample of one row.

    It depends on the seed, the row's own tokens and the sample's number only, so that a
    sampled answer does not depend on the batch it is computed in (promise 3). The same row
    given twice therefore gets the same samples; ask for `n` samples to get different ones.
    """
    content = hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).digest()
    return np.random.default_rng([seed, sample, *np.frombuffer(content, dtype=np.uint32).tolist()])


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's likeliest token (the first, of equal ones) and the log of its partition.

    Args:
        logits: `[b, vocabulary]` float32.

    Returns:
        Token ids `[b]` int64, and `logsumexp` of the logits `[b]`, to 1e-5.
    """
    kernels = available() if logits.device.type == "cpu" else None
    if kernels is None or not logits.is_contiguous():
        return logits.argmax(-1), logits.logsumexp(-1)
    return kernels.likeliest(logits)


def next_tokens(
    logits: Tensor, randoms: Sequence[np.random.Generator], temperature: float, top_p: float
) -> Tensor:
    """Choose one token per row.

    An exponential race (the Gumbel-max trick, Yellott 1977): of all tokens the one whose
    exponential time, divided by its probability, is the shortest. Inverting the cumulative
    distribution takes one number for all tokens, but what a draw finds then hangs on the sum of
    thousands of probabilities, and in a flat tail on their order: rounding, which differs from
    batch to batch, would change some draw in every few hundred (promise 3).

    Args:
        logits: `[b, vocabulary]` float32.
        randoms: each row's own stream, `b` of them; a draw takes a number for every token.
        temperature: above 0; see `likeliest` for greedy.
        top_p: keep the smallest set of most likely tokens with at least this probability
            (nucleus sampling, Holtzman et al. 2020).

    Returns:
        Token ids, `[b]` int64.
    """
    # Below the greatest, so that a tiny temperature makes -inf of them and never inf.
    below = logits.double() - logits.amax(-1, keepdim=True)
    kept = torch.softmax(below / temperature, -1)
    if top_p < 1:
        descending, order = kept.sort(stable=True, dim=-1, descending=True)
        before = descending.cumsum(-1) - descending
        nucleus = torch.where(before < top_p, descending, 0.0)
        kept = torch.zeros_like(kept).scatter(1, order, nucleus)
    size = logits.shape[1]
    drawn = np.stack([own.standard_exponential(size, dtype=np.float32) for own in randoms])
    times = torch.from_numpy(drawn).clamp_(min=float(np.finfo(np.float32).tiny))
    # A row of NaN has no shortest time: any token will do for it, its neighbours get theirs.
    return (kept / times.to(logits.device)).argmax(-1)
