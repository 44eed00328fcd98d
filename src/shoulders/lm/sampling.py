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
    logits: Tensor, uniforms: Sequence[float], temperature: float, top_p: float
) -> Tensor:
    """Choose one token per row.

    Args:
        logits: `[b, vocabulary]` float32.
        uniforms: `b` numbers in [0, 1), one from each row's stream.
        temperature: above 0; see `likeliest` for greedy.
        top_p: keep the smallest set of most likely tokens with at least this probability
            (nucleus sampling, Holtzman et al. 2020).

    Returns:
        Token ids, `[b]` int64.
    """
    # Below the greatest, so that a tiny temperature makes -inf of them and never inf.
    below = logits.double() - logits.amax(-1, keepdim=True)
    probabilities, order = torch.softmax(below / temperature, -1).sort(
        stable=True, dim=-1, descending=True
    )
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < top_p, probabilities, 0.0)
    cumulative = kept.cumsum(-1)
    draws = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)[:, None]
    # Inverse of the cumulative distribution: the first token whose sum exceeds the draw.
    place = (cumulative <= draws * cumulative[:, -1:]).sum(-1, keepdim=True)
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1)
    # A row of NaN keeps nothing: any token will do for it, its neighbours are to get theirs.
    place = place.clamp(min=0)
    return order.gather(1, place)[:, 0]
