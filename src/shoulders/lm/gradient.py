"""One fused layer in autograd's eyes, whichever functions compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from shoulders.lm.inside import Inside, Work
from shoulders.lm.layer import Layer, Rows, Sizes

# Where the positions of every set of factors are, and the type they are multiplied in.
Added = tuple[list[Tensor | None], torch.dtype]


class Functions(Protocol):
    """`shoulders.lm.block`, or an equal of it."""

    def forward(
        self, x: Tensor, prefix: Tensor, work: Work
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Return the layer's output, rotated qkv, and what `backward` needs."""
        ...

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x` and of `prefix`."""
        ...


class LayerFunction(torch.autograd.Function):
    """One layer in autograd's eyes: inputs `x [t, d]`, `prefix [2, b, q, kv_heads, e]`, factors.

    `added` is where the factors' positions are, and the type they are multiplied in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        prefix: Tensor,
        layer: Layer,
        rows: Rows,
        sizes: Sizes,
        run: Functions,
        recompute: bool,
        added: Added,
        *pairs: Tensor,
    ) -> Tensor:
        """Return the layer's output `[t, d]`."""
        with as_typed():
            inside = inside_of(layer, added, pairs)
            y, _, saved = run.forward(x, prefix, Work(layer, rows, sizes, inside))
        ctx.constants = layer, rows, sizes, run, added
        ctx.recompute, ctx.count = recompute, len(pairs)
        ctx.save_for_backward(*pairs, *((x, prefix) if recompute else saved))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of `x`, `prefix` and `pairs`."""
        layer, rows, sizes, run, added = ctx.constants
        pairs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        with torch.no_grad(), as_typed():
            inside = inside_of(layer, added, pairs)
            work = Work(layer, rows, sizes, inside)
            if ctx.recompute:
                _, _, saved = run.forward(*saved, work)
            g_x, g_prefix = run.backward(gradients[0], saved, work)
            g_pairs = inside.gradients() if inside else ()
        return g_x, g_prefix, *[None] * 6, *g_pairs


def as_typed() -> torch.autocast:
    """Return a context in which products keep their type: C is told what types tensors have."""
    return torch.autocast("cpu", enabled=False)


def inside_of(layer: Layer, added: Added, pairs: Sequence[Tensor]) -> Inside | None:
    """Return a layer's factors on their positions, None where there are none."""
    places, dtype = added
    return Inside(layer, places, pairs, dtype) if pairs else None
