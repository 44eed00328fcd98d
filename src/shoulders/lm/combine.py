"""The combiner: `[prompt ; token embeddings]`, mask and position ids, one row at a time.

Whatever stands in a batch beside a row (pads, other prompts of other lengths and forms) must
not change that row: pads go outside `[prompt ; tokens]`, never between the two, and every
real position counts on from its row's own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from shoulders.errors import WindowError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt


@dataclass(slots=True)
class Combined:
    """A batch ready for `FrozenLM.hidden`.

    Attributes:
        embeddings: `[b, s, d]`.
        mask: `[b, q + s]` int64, over `q` cached prefix positions and the batch itself.
        positions: `[b, s]` int64.
        cache: holds the prefix keys/values, or None when no row has any and none was asked for.
        first_token: `[b]` int64, index in `s` of each row's first token.
        lengths: `[b]` int64, real positions of each row: prefix + vectors + tokens.
    """

    embeddings: Tensor
    mask: Tensor
    positions: Tensor
    cache: DynamicCache | None
    first_token: Tensor
    lengths: Tensor


def combine(
    lm: FrozenLM,
    prompt: Prompt,
    token_ids: Sequence[Sequence[int]],
    *,
    pad: Literal["left", "right"] = "right",
    keep_cache: bool = False,
) -> Combined:
    """Join prompts and tokens of `b` rows into one batch.

    Args:
        lm: the frozen LM.
        prompt: one prompt per row, of any mix of forms and lengths.
        token_ids: `b` lists of token ids, each with at least one id.
        pad: side of the padding around `[prompt ; tokens]`; left lets generation append.
        keep_cache: return a cache even when no row has a prefix.

    Raises:
        WindowError: a row is longer than the LM's window (names the row, from 1), or is empty.
    """
    counts = [len(ids) for ids in token_ids]
    embedded = lm.embed_rows(token_ids)
    return combine_embedded(lm, prompt, embedded, counts, pad=pad, keep_cache=keep_cache)


def combine_embedded(
    lm: FrozenLM,
    prompt: Prompt,
    embedded: Tensor,
    counts: Sequence[int],
    *,
    pad: Literal["left", "right"] = "right",
    keep_cache: bool = False,
) -> Combined:
    """Join as `combine` does, with embeddings `[t, d]` of all rows end to end in place of ids."""
    if prompt.rows != len(counts):
        raise ValueError(f"{prompt.rows} prompts for {len(counts)} rows of tokens")
    tokens = np.array(counts)
    check_window(lm, prompt, tokens)

    p = prompt.vectors.shape[1]
    vector_mask = prompt.vector_mask.cpu().numpy()
    span = vector_mask.sum(1) + tokens
    b, s = len(counts), int(span.max())

    # One gather builds all rows: `source` holds a zero pad, every prompt vector, every token.
    index = np.zeros((b, s), dtype=np.int64)
    real = np.zeros((b, s), dtype=np.int64)
    first = np.zeros(b, dtype=np.int64)
    token_at = 1 + b * p
    for row in range(b):
        start = s - span[row] if pad == "left" else 0
        vectors = 1 + row * p + np.flatnonzero(vector_mask[row])
        first[row] = start + len(vectors)
        index[row, start : first[row]] = vectors
        end = first[row] + tokens[row]
        index[row, first[row] : end] = np.arange(token_at, token_at + tokens[row])
        real[row, start:end] = 1
        token_at += tokens[row]

    device = lm.device
    pieces = [embedded.new_zeros(1, embedded.shape[1])]
    if p:
        pieces.append(prompt.vectors.reshape(b * p, -1).to(embedded))
    pieces.append(embedded)
    embeddings = torch.cat(pieces)[torch.from_numpy(index).to(device)]

    own = torch.from_numpy(real).to(device)
    prefix_mask = prompt.keys_values_mask.to(device=device, dtype=torch.int64)
    prefix = prefix_mask.sum(1, keepdim=True)
    # A pad's position is never read: 0 keeps it inside learned position tables (GPT-2).
    positions = (prefix + own.cumsum(1) - 1) * own
    return Combined(
        embeddings=embeddings,
        mask=torch.cat([prefix_mask, own], 1),
        positions=positions,
        cache=_prefix_cache(lm, prompt, keep_cache),
        first_token=torch.from_numpy(first).to(device),
        lengths=prefix[:, 0] + torch.from_numpy(span).to(device),
    )


def _prefix_cache(lm: FrozenLM, prompt: Prompt, keep_cache: bool) -> DynamicCache | None:
    """Put per-layer keys/values `[b, layers, 2, kv_heads, q, head_dim]` into a fresh cache."""
    q = prompt.keys_values.shape[4]
    if q == 0:
        return lm.new_cache() if keep_cache else None
    expected = (lm.prefix_shape.layers, 2, lm.prefix_shape.kv_heads, q, lm.prefix_shape.head_dim)
    if tuple(prompt.keys_values.shape[1:]) != expected:
        raise ValueError(f"prefix {tuple(prompt.keys_values.shape[1:])}, LM needs {expected}")
    cache = lm.new_cache()
    prefix = prompt.keys_values.to(device=lm.device, dtype=lm.dtype)
    for layer in range(expected[0]):
        cache.update(prefix[:, layer, 0], prefix[:, layer, 1], layer)
    return cache


def check_window(lm: FrozenLM, prompt: Prompt, tokens: np.ndarray) -> None:
    """Raise `WindowError` for rows (`[b]` token counts) that are empty or too long."""
    total = prompt.lengths().cpu().numpy() + tokens
    if (tokens == 0).any():
        raise WindowError(f"row {int(tokens.argmin()) + 1} of the batch has no tokens")
    if (total > lm.max_positions).any():
        row = int(total.argmax())
        raise WindowError(
            f"row {row + 1} of the batch takes {total[row]} positions, the window of {lm.name} "
            f"has {lm.max_positions}; shorten the input, or allow truncation"
        )
