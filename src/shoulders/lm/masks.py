"""Attention masks of LMs whose layers see a window of positions, counted as rows count them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def masks_by_position(mask: Tensor, s: int, window: int, dtype: torch.dtype, config: Any) -> Any:
    """Return additive masks for full and sliding layers, counting real positions only.

    transformers' own sliding mask counts places, so that pads between a cached prefix and
    a row's tokens would push the prefix out of the window too early.

    Args:
        mask: `[b, c + s]` int64, 1 where a position is real.
        s: positions that are read now.
        window: how many positions a sliding layer sees.
        dtype: of the scores that the masks are added to.
        config: the LM's; where its layers are of both kinds they take masks by their kind's name.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    position = mask.cumsum(1) - 1
    seen = (place[None, :] <= place[-s:, None]) & mask.bool()[:, None]
    near = position[:, None] > position[:, -s:, None] - window
    low = torch.finfo(dtype).min
    zeros = torch.zeros(seen.shape, dtype=dtype, device=mask.device)[:, None]
    full, sliding = (zeros.masked_fill(~m[:, None], low) for m in (seen, seen & near))
    if getattr(config.get_text_config(), "layer_types", None) is None:
        return sliding
    return {"full_attention": full, "sliding_attention": sliding}
