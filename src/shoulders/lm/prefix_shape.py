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
    placed = getattr(lm.model, "hf_device_map", None) or {}  # a device map's
    if len({d for d in placed.values() if d not in ("cpu", "disk")}) > 1:
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
    if not lm.takes_positions and not _apart_from_pads(lm):
        raise LMError(
            f"{lm.name}: pads between a key/value prefix and a row change what it reads; use a "
            "producer of input vectors"
        )
    _, kv_heads, _, head_dim = next(iter(shapes))[0]
    return PrefixShape(len(cache.layers), kv_heads, head_dim)


def _apart_from_pads(lm: FrozenLM) -> bool:
    """Tell whether a token behind a cached one and a pad is what it is without the pad."""

    def last(ids: list[int], mask: list[int]) -> torch.Tensor:
        cache, first = lm.new_cache(), torch.ones(1, 1, dtype=torch.long, device=lm.device)
        lm.hidden(lm.embed(first), first, torch.zeros_like(first), cache)
        seen = torch.tensor([mask], device=lm.device)
        positions = (seen.cumsum(1) - 1)[:, 1:]
        embedded = lm.embed(torch.tensor([ids], device=lm.device))
        return lm.hidden(embedded, seen, positions, cache)[0, -1]

    alone, padded = last([2], [1, 1]).float(), last([0, 2], [1, 0, 1]).float()
    tolerance = 1e-4 if lm.dtype == torch.float32 else 0.05
    return bool((padded - alone).norm() <= tolerance * alone.norm())
