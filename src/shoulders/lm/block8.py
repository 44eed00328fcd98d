"""The layer of `shoulders.lm.block` for int8 weights, with compiled kernels between products.

The same functions of the same arguments; what they round and sum in other orders differs in the
last bits. float32 activations only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoulders.lm.block import Layer, Matrix, Rows, Sizes, multiplied
from shoulders.lm.kernels import Kernels
from shoulders.lm.laid import Laid
from shoulders.lm.tiles import fits_tiles


class Block8:
    """`forward` and `backward` as in `shoulders.lm.block`.

    Where the processor has AMX, products are those of `shoulders.lm.tiles`.
    """

    def __init__(self, kernels: Kernels, laid: Laid) -> None:
        self._kernels, self._laid = kernels, laid

    def forward(
        self, x: Tensor, prefix: Tensor, layer: Layer, rows: Rows, sizes: Sizes
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Map `x [t, d]` to the layer's output `[t, d]`; the second result is rotated qkv."""
        kernels, prefix = self._kernels, prefix.contiguous()
        levels = kernels.norm_round(x, layer.attention_norm, sizes.epsilon)
        qkv = self._times(levels, layer.qkv)
        kernels.rotate(qkv, rows, sizes)
        read = kernels.attend(qkv, prefix, rows, sizes)
        middle = self._times(kernels.round_rows(read), layer.output, rest=x)
        levels = kernels.norm_round(middle, layer.feed_norm, sizes.epsilon)
        gate_up = self._times(levels, layer.gate_up, half=True)
        y = self._times(kernels.gate_round(gate_up), layer.down, rest=middle)
        return y, qkv, (x, prefix, qkv, middle, gate_up)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], layer: Layer, rows: Rows, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
        kernels, gradient = self._kernels, gradient.contiguous()
        x, prefix, qkv, middle, gate_up = tensors
        channel = layer.gate_up.scale
        assert channel is not None
        product, scale = self._back(gradient, layer.down)
        levels, scale = kernels.gate_back_round(product, scale, gate_up, channel)
        product = self._multiplied_back(levels, layer.gate_up)
        g_middle = kernels.norm_back(
            product, scale, middle, layer.feed_norm, sizes.epsilon, gradient
        )
        g_read = kernels.rescale(*self._back(g_middle, layer.output), None)
        g_qkv, g_prefix = kernels.attend_back(g_read, qkv, prefix, rows, sizes)
        kernels.rotate(g_qkv, rows, sizes, -1.0)
        product, scale = self._back(g_qkv, layer.qkv)
        g_x = kernels.norm_back(product, scale, x, layer.attention_norm, sizes.epsilon, g_middle)
        return g_x, g_prefix

    def _times(
        self,
        rounded: tuple[Tensor, Tensor],
        matrix: Matrix,
        rest: Tensor | None = None,
        *,
        half: bool = False,
    ) -> Tensor:
        """Return `x W^T + bias + rest`; with `half` in bfloat16 where tiles make it.

        What is kept for the way back costs as much to write and to read as the products take: half
        of most of it is kept (the gates, whose product is rounded to eight bits next).
        """
        (levels, scale), kernels = rounded, self._kernels
        if kernels.tiles is not None and fits_tiles(matrix.values):
            weights = self._laid.forward(matrix.values)
            scales = scale, matrix.scale, matrix.bias
            return kernels.tiles.product(levels, weights, *scales, rest, half=half)
        product = multiplied(levels, matrix.values.T)
        return kernels.rescale(product, scale, matrix.scale, matrix.bias, rest)

    def _back(self, gradient: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        levels, scale = self._kernels.round_rows(gradient, matrix.scale)
        return self._multiplied_back(levels, matrix), scale

    def _multiplied_back(self, levels: Tensor, matrix: Matrix) -> Tensor:
        tiles = self._kernels.tiles
        if tiles is not None and fits_tiles(matrix.values):
            return tiles.product(levels, self._laid.back(matrix.values))
        return multiplied(levels, matrix.values)
