"""The layer of `shoulders.lm.block` for bfloat16 weights where the processor has AMX.

The same functions of the same arguments. What is multiplied is bfloat16; sums, the states between
layers, queries, keys, values and attention are float32, which Hugging Face's modules round to
bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoulders.lm.inside import DOWN, GATE_UP, OUTPUT, QKV, Work
from shoulders.lm.kernels import Kernels
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Matrix
from shoulders.lm.tiles import Tiles


class Block16:
    """`forward` and `backward` as in `shoulders.lm.block`, of float32 states."""

    def __init__(self, kernels: Kernels, tiles: Tiles, laid: Laid) -> None:
        self._kernels, self._tiles, self._laid = kernels, tiles, laid

    def forward(
        self, x: Tensor, prefix: Tensor, work: Work
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Map `x [t, d]` to the layer's output `[t, d]`; the second result is rotated qkv."""
        layer, rows, sizes, inside = work
        kernels, tiles = self._kernels, self._tiles
        x, prefix = x.contiguous(), prefix.contiguous()
        kept: list[Tensor] = []

        def times(
            site: int, read: Tensor, by: Matrix, rest: Tensor | None = None, *, half: bool = False
        ) -> Tensor:
            y = self._times(read, by, rest, half=half)
            if inside:
                kept.append(inside.add(site, read, y))
            return y

        normed = tiles.norm_half(x, layer.attention_norm, sizes.epsilon)
        qkv = times(QKV, normed, layer.qkv)
        kernels.rotate(qkv, rows, sizes)
        read = kernels.attend(qkv, prefix, rows, sizes)
        middle = times(OUTPUT, read.bfloat16(), layer.output, x)
        normed = tiles.norm_half(middle, layer.feed_norm, sizes.epsilon)
        gate_up = times(GATE_UP, normed, layer.gate_up, half=True)
        y = times(DOWN, tiles.gate_half(gate_up), layer.down, middle)
        return y, qkv, (x, prefix, qkv, middle, gate_up, *kept)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
        layer, rows, sizes, inside = work
        kernels, tiles, gradient = self._kernels, self._tiles, gradient.contiguous()
        x, prefix, qkv, middle, gate_up, *kept = tensors

        def back(site: int, g: Tensor, by: Matrix) -> Tensor:
            g = g.bfloat16()
            through = self._back(g, by)
            if inside:
                through += inside.back(site, kept[site], g)
            return through

        g_gates = tiles.gate_back_half(back(DOWN, gradient, layer.down), gate_up)
        through = back(GATE_UP, g_gates, layer.gate_up)
        g_middle = tiles.norm_back(through, middle, layer.feed_norm, sizes.epsilon, gradient)
        g_read = back(OUTPUT, g_middle, layer.output)
        g_qkv, g_prefix = kernels.attend_back(g_read, qkv, prefix, rows, sizes)
        kernels.rotate(g_qkv, rows, sizes, -1.0)
        through = back(QKV, g_qkv, layer.qkv)
        g_x = tiles.norm_back(through, x, layer.attention_norm, sizes.epsilon, g_middle)
        return g_x, g_prefix

    def _times(
        self, x: Tensor, matrix: Matrix, rest: Tensor | None = None, *, half: bool = False
    ) -> Tensor:
        weights = self._laid.forward(matrix.values)
        return self._tiles.product(x, weights, None, None, matrix.bias, rest, half=half)

    def _back(self, gradient: Tensor, matrix: Matrix) -> Tensor:
        return self._tiles.product(gradient, self._laid.back(matrix.values))
