"""The layer of `shoulders.lm.block` for float32 states, with compiled attention.

The same functions of the same arguments; norms are torch's, and products where the weights are
float32 too (`shoulders.lm.wide` has others). Attention reads a cache
where it lies and sees no pads, where torch's would copy both together first.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoulders.lm.block import Products, feed, feed_back, norm, norm_back
from shoulders.lm.inside import OUTPUT, QKV, Work
from shoulders.lm.kernels import Kernels


class Block32:
    """`forward` and `backward` as in `shoulders.lm.block`."""

    def __init__(self, kernels: Kernels, by: Products) -> None:
        self._kernels, self._by = kernels, by

    def forward(
        self, x: Tensor, prefix: Tensor, work: Work
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Map `x [t, d]` to the layer's output `[t, d]`; the second result is rotated qkv."""
        (layer, rows, sizes, inside), by = work, self._by
        prefix = prefix.contiguous()
        normed = norm(x, layer.attention_norm, sizes.epsilon)
        qkv = by.times(normed, layer.qkv)
        kept = [inside.add(QKV, normed, qkv)] if inside else []
        self._kernels.rotate(qkv, rows, sizes)
        read = self._kernels.attend(qkv, prefix, rows, sizes)
        middle = x + by.times(read, layer.output)
        if inside:
            kept.append(inside.add(OUTPUT, read, middle))
        y, gate_up = feed(middle, layer, sizes.epsilon, inside, kept, by)
        return y, qkv, (x, prefix, qkv, middle, gate_up, *kept)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
        (layer, rows, sizes, inside), by = work, self._by
        x, prefix, qkv, middle, gate_up, *kept = tensors
        gradient = gradient.contiguous()
        g_middle = feed_back(gradient, middle, gate_up, layer, sizes.epsilon, inside, kept, by)
        g_read = by.back(g_middle, layer.output)
        if inside:
            g_read += inside.back(OUTPUT, kept[OUTPUT], g_middle)
        g_qkv, g_prefix = self._kernels.attend_back(g_read, qkv, prefix, rows, sizes)
        self._kernels.rotate(g_qkv, rows, sizes, -1.0)
        through = by.back(g_qkv, layer.qkv)
        if inside:
            through += inside.back(QKV, kept[QKV], g_qkv)
        return g_middle + norm_back(through, x, layer.attention_norm, sizes.epsilon), g_prefix
