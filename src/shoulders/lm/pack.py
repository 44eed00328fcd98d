"""Rows without padding: one sequence, a mask that keeps every row to itself.

Nearly all of the LM's work is in its linear layers, which do not care where a row ends. So
the rows of a training batch are laid end to end as ONE row of `t` positions, and attention is
told by a mask which keys belong to whom. No pads are computed, and a prompt that all rows
share (a static one) is computed once. The attention itself computes all `t x (q + t)` pairs,
so packs should stay at some hundred positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from shoulders.lm.combine import check_window
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt

SHARED = -1  # owner of positions that every row sees


@dataclass(slots=True)
class Packed:
    """A pack ready for `FrozenLM.hidden`.

    Attributes:
        embeddings: `[1, t, d]`.
        mask: `[1, 1, t, q + t]`, 0 where a key is seen and the dtype's minimum elsewhere.
        positions: `[1, t]` int64.
        cache: the prefix keys/values of all rows, `q` positions, or None.
        first_token: index in `t` of each row's first token, `b` of them.
        owner: `[1, t]`, the row that each position belongs to; what all share is the first's.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    cache: DynamicCache | None
    first_token: list[int]
    owner: Tensor


def can_pack(lm: FrozenLM, prompt: Prompt, counts: Sequence[int]) -> bool:
    """Tell whether a pack computes what the LM would: not beyond a sliding window.

    A layer that sees only the last `w` positions needs a mask of its own; within `w`
    positions it sees all, and one mask serves every layer.
    """
    longest = int((torch.tensor(counts) + prompt.lengths().cpu()).max())
    return lm.packs and (lm.sliding_window is None or longest <= lm.sliding_window)


def pack(lm: FrozenLM, prompt: Prompt, embedded: Tensor, counts: Sequence[int]) -> Packed:
    """Lay `b` rows of `[prompt ; embeddings]` end to end; `embedded` is `[t, d]`, without.

    Hidden states at a row's positions are those of `combine`, to rounding (tested on full
    logits). Raises `WindowError` as `combine` does.
    """
    tokens = np.array(counts)
    check_window(lm, prompt, tokens)
    shared = prompt.shared
    prefix, prefix_owner = _prefix(lm, prompt, shared)
    prefix_lengths = prompt.keys_values_mask.sum(1).tolist()

    vectors, owner, position, order, first = [], [], [], [], []
    if shared and prompt.vectors.shape[1]:
        p = prompt.vectors.shape[1]
        vectors = [prompt.vectors[0]]
        owner, position = [SHARED] * p, [*range(prefix_lengths[0], prefix_lengths[0] + p)]
        order = [*range(p)]
    elif prompt.vectors.shape[1]:
        vectors = [prompt.vectors[prompt.vector_mask]]
    # `source` holds the prompt vectors of all rows, then the tokens of all rows.
    next_vector, next_token = 0, sum(len(v) for v in vectors)
    own_vectors = prompt.vector_mask.sum(1).tolist()
    for row, count in enumerate(tokens.tolist()):
        before = prefix_lengths[row] + (own_vectors[row] if shared else 0)
        p = 0 if shared else own_vectors[row]
        order += [*range(next_vector, next_vector + p), *range(next_token, next_token + count)]
        first.append(len(owner) + p)
        owner += [row] * (p + count)
        position += range(before, before + p + count)
        next_vector, next_token = next_vector + p, next_token + count

    source = torch.cat([*(v.to(embedded) for v in vectors), embedded])
    owners = torch.tensor(owner)
    keys = torch.cat([prefix_owner, owners])
    causal = torch.ones(len(owner), len(owner), dtype=torch.bool).tril()
    seen = (keys[None] == owners[:, None]) | (keys[None] == SHARED)
    seen[:, len(prefix_owner) :] &= causal
    mask = torch.zeros(seen.shape, dtype=lm.dtype).masked_fill_(~seen, torch.finfo(lm.dtype).min)
    return Packed(
        embeddings=source[torch.tensor(order, device=lm.device)][None],
        mask=mask.to(lm.device)[None, None],
        positions=torch.tensor(position, device=lm.device)[None],
        cache=prefix,
        first_token=first,
        owner=owners.clamp_min(0).to(lm.device)[None],
    )


def _prefix(lm: FrozenLM, prompt: Prompt, shared: bool) -> tuple[DynamicCache | None, Tensor]:
    """Return all rows' prefixes in one cache of one row, and the owner of each position."""
    if prompt.keys_values.shape[4] == 0:
        return None, torch.empty(0, dtype=torch.long)
    keys_values = prompt.keys_values[:1] if shared else prompt.keys_values
    real = (prompt.keys_values_mask[:1] if shared else prompt.keys_values_mask).cpu()
    # [b, layers, 2, heads, q, dim] -> [layers, 2, heads, b * q, dim], then only the real ones
    flat = keys_values.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).to(device=lm.device, dtype=lm.dtype)
    if not bool(real.all()):
        flat = flat[:, :, :, real.flatten().to(lm.device)]
    owner = torch.arange(len(real))[:, None].expand(real.shape)[real]
    # Plain layers whatever the LM's own (sliding windows would drop keys): the mask decides.
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(flat):
        cache.update(keys[None], values[None], layer)
    return cache, torch.full_like(owner, SHARED) if shared else owner
