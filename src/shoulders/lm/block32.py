"""The layer of `shoulders.lm.block` for float32 weights, with compiled attention.

The same functions of the same arguments; products and norms are torch's. Attention reads a cache
where it lies and sees no pads, where torch's would copy both together first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoulders.lm.block import (
    Layer,
    Rows,
    Sizes,
    feed,
    feed_back,
    norm,
    norm_back,
    times,
    times_back,
)
from shoulders.lm.kernels import Kernels


class Block32:
    """`forward` and `backward` as in `shoulders.lm.block`."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def forward(
        self, x: Tensor, prefix: Tensor, layer: Layer, rows: Rows, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Map `x [t, d]` to the layer's output `[t, d]`; the second result is rotated qkv."""
        prefix = prefix.contiguous()
        qkv = times(norm(x, layer.attention_norm, sizes.epsilon), layer.qkv)
        self._kernels.rotate(qkv, rows, sizes)
        read = self._kernels.attend(qkv, prefix, rows, sizes)
        middle = x + times(read, layer.output)
        y, gate_up = feed(middle, layer, sizes.epsilon)
        return y, qkv, (x, prefix, qkv, middle, gate_up)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], layer: Layer, rows: Rows, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
        x, prefix, qkv, middle, gate_up = tensors
        g_middle = feed_back(gradient.contiguous(), middle, gate_up, layer, sizes.epsilon)
        g_read = times_back(g_middle, layer.output)
        g_qkv, g_prefix = self._kernels.attend_back(g_read, qkv, prefix, rows, sizes)
        self._kernels.rotate(g_qkv, rows, sizes, -1.0)
        through = times_back(g_qkv, layer.qkv)
        return g_middle + norm_back(through, x, layer.attention_norm, sizes.epsilon), g_prefix
