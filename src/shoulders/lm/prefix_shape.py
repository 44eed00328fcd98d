"""What one position of an LM's key/value cache looks like, learned by reading one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from shoulders.errors import LMError

if TYPE_CHECKING:
    from shoulders.lm.frozen import FrozenLM


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """Shape of one position of the LM's key/value cache: `[layers, 2, kv_heads, head_dim]`."""

    layers: int
    kv_heads: int
    head_dim: int


@torch.no_grad()
def prefix_shape(lm: FrozenLM) -> PrefixShape:
    """Return the shape of an LM's cache; raises `LMError` where layers differ in shape or place."""
    if len({d for d in lm.placed.values() if d not in ("cpu", "disk")}) > 1:
        raise LMError(
            f"{lm.name}: its layers compute on several devices, where a key/value prefix "
            "does not follow them; use a producer of input vectors, or another device_map"
        )
    cache = lm.new_cache()
    ids = torch.zeros(1, 1, dtype=torch.long, device=lm.device)
    lm.hidden(lm.embed(ids), torch.ones_like(ids), torch.zeros_like(ids), cache)
    shapes = {(layer.keys.shape, layer.values.shape) for layer in cache.layers}
    if len(shapes) != 1 or len({s for pair in shapes for s in pair}) != 1:
        raise LMError(
            f"{lm.name}: its layers cache keys/values of different shapes, so a "
            "key/value prefix does not fit; use a producer of input vectors"
        )
    _, kv_heads, _, head_dim = next(iter(shapes))[0]
    return PrefixShape(len(cache.layers), kv_heads, head_dim)
