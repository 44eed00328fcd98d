"""Where rows that are laid end to end lie, what each position sees, and its rotary tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.layer import Mask, Rows


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
    for row, (start, length) in enumerate(spans):
        spread[row, :length] = np.arange(start, start + length)
        packed[start : start + length] = row * s + np.arange(length)
        first = q + (shared if row or not shared else 0)
        position[start : start + length] = first + np.arange(length)
    cos, sin = rotary(x[None], torch.from_numpy(position)[None])
    half, before, dtype = width // 2, q + shared, x.dtype

    def mask() -> Tensor:
        seen = torch.ones(b, s, before + s, dtype=torch.bool)
        seen[:, :, before:] = torch.ones(s, s, dtype=torch.bool).tril()
        if shared:
            seen[0, :, q:before] = False  # the shared row is what the others see there
        return _added(seen, dtype)

    return Rows(
        cos[0, :, None, :half].contiguous(),
        sin[0, :, None, :half].contiguous(),
        torch.from_numpy(spread).flatten(),
        torch.from_numpy(packed),
        Mask((b, 1, s, before + s), mask),
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
    cos, sin = rotary(x[None], places[None])
    half, read, dtype = width // 2, cache.lengths, x.dtype

    def mask() -> Tensor:
        seen = torch.ones(b, s, most + s, dtype=torch.bool)
        seen[:, :, :most] = (torch.arange(most) < read[:, None])[:, None]
        seen[:, :, most:] = torch.ones(s, s, dtype=torch.bool).tril()
        return _added(seen, dtype)

    return Rows(
        cos[0, :, None, :half].contiguous(),
        sin[0, :, None, :half].contiguous(),
        spread.flatten(),
        owner * s + offset,
        Mask((b, 1, s, most + s), mask),
        starts,
        lengths,
        read,
        cache.slots,
    )


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `[b, 1, s, c + s]`: 0 where a key is seen, the dtype's minimum elsewhere."""
    mask = torch.zeros(seen.shape, dtype=dtype)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
