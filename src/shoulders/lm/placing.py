"""Where rows that are laid end to end lie, what each position sees, and its rotary tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.layer import Rows


def laid_rows(
    x: Tensor, spans: list[tuple[int, int]], q: int, shared: int, rotary: Any, width: int
) -> Rows:
    """Return the places of rows that begin here, each after its prompt.

    Args:
        x: `[t, d]`, all rows.
        spans: where each begins in `t`, and its length; a shared prompt's vectors are the first.
        q: positions of each row's prefix.
        shared: positions of a prompt that all rows share, or 0.
        rotary: the LM's own module.
        width: of a head.
    """
    t, s = len(x), max(length for _, length in spans)
    b = len(spans)
    spread = np.zeros((b, s), dtype=np.int64)
    packed, position = np.zeros(t, dtype=np.int64), np.zeros(t, dtype=np.int64)
    seen = np.zeros((b, s, q + shared + s), dtype=bool)
    seen[:, :, q + shared :] = np.tri(s, dtype=bool)
    seen[:, :, : q + shared] = True
    if shared:
        seen[0, :, q : q + shared] = False  # the shared row is what the others see there
    for row, (start, length) in enumerate(spans):
        spread[row, :length] = np.arange(start, start + length)
        packed[start : start + length] = row * s + np.arange(length)
        before = q + (shared if row or not shared else 0)
        position[start : start + length] = before + np.arange(length)
    cos, sin = rotary(x[None], torch.from_numpy(position)[None])
    half = width // 2
    mask = torch.zeros(seen.shape, dtype=x.dtype)
    mask.masked_fill_(~torch.from_numpy(seen), torch.finfo(x.dtype).min)
    return Rows(
        cos[0, :, None, :half].contiguous(),
        sin[0, :, None, :half].contiguous(),
        torch.from_numpy(spread).flatten(),
        torch.from_numpy(packed),
        mask[:, None],
        torch.tensor([start for start, _ in spans]),
        torch.tensor([length for _, length in spans]),
    )


def further_rows(
    x: Tensor,
    places: Tensor,
    owner: Tensor,
    starts: Tensor,
    lengths: Tensor,
    cache: Cache,
    rotary: Any,
    width: int,
) -> Rows:
    """Return the places of what a cache's rows go on with.

    Args:
        x: `[t, d]`, all rows.
        places: `[t]`, each position's place in its row.
        owner: `[t]`, the row that each belongs to.
        starts: `[b]`, where each row begins in `t`.
        lengths: `[b]`, how many positions each has.
        cache: what they have read before.
        rotary: the LM's own module.
        width: of a head.
    """
    offset = torch.arange(len(x)) - starts[owner]
    b, s, most = len(lengths), int(lengths.max()), int(cache.lengths.max())
    spread = torch.zeros(b, s, dtype=torch.long)
    spread[owner, offset] = torch.arange(len(x))
    seen = torch.ones(b, s, most + s, dtype=torch.bool)
    seen[:, :, :most] = (torch.arange(most) < cache.lengths[:, None])[:, None]
    seen[:, :, most:] = torch.ones(s, s, dtype=torch.bool).tril()
    cos, sin = rotary(x[None], places[None])
    half = width // 2
    mask = torch.zeros(seen.shape, dtype=x.dtype)
    return Rows(
        cos[0, :, None, :half].contiguous(),
        sin[0, :, None, :half].contiguous(),
        spread.flatten(),
        owner * s + offset,
        mask.masked_fill_(~seen, torch.finfo(x.dtype).min)[:, None],
        starts,
        lengths,
        cache.lengths,
        cache.slots,
    )
