"""The layer of `shoulders.lm.block` for int8 weights, with compiled kernels between products.

The same functions of the same arguments; what they round and sum in other orders differs in the
last bits. float32 activations only.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shoulders.lm.block import multiplied
from shoulders.lm.inside import DOWN, GATE_UP, OUTPUT, QKV, Work
from shoulders.lm.kernels import Kernels
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Matrix
from shoulders.lm.tiles import Tiles


class Block8:
    """`forward` and `backward` as in `shoulders.lm.block`.

    Products are those of `shoulders.lm.tiles` where the processor has AMX, of `shoulders.lm.pairs`
    where it has AVX2 only, and torch's between.
    """

    def __init__(self, kernels: Kernels, laid: Laid) -> None:
        self._kernels, self._laid = kernels, laid

    def forward(
        self, x: Tensor, prefix: Tensor, work: Work
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Map `x [t, d]` to the layer's output `[t, d]`; the second result is rotated qkv."""
        layer, rows, sizes, inside = work
        kernels, prefix, kept = self._kernels, prefix.contiguous(), list[Tensor]()

        def times(
            site: int,
            read: tuple[Tensor, Tensor],
            by: Matrix,
            rest: Tensor | None = None,
            *,
            half: bool = False,
        ) -> Tensor:
            y = self._times(read, by, rest, half=half)
            if inside:
                levels, scale = read
                kept.append(inside.add(site, levels * scale[:, None], y))
            return y

        levels = kernels.norm_round(x, layer.attention_norm, sizes.epsilon)
        qkv = times(QKV, levels, layer.qkv)
        kernels.rotate(qkv, rows, sizes)
        read = kernels.attend(qkv, prefix, rows, sizes)
        middle = times(OUTPUT, kernels.round_rows(read), layer.output, x)
        levels = kernels.norm_round(middle, layer.feed_norm, sizes.epsilon)
        gate_up = times(GATE_UP, levels, layer.gate_up, half=True)
        y = times(DOWN, kernels.gate_round(gate_up), layer.down, middle)
        return y, qkv, (x, prefix, qkv, middle, gate_up, *kept)

    def backward(
        self, gradient: Tensor, tensors: Sequence[Tensor], work: Work
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
        layer, rows, sizes, inside = work
        kernels, gradient = self._kernels, gradient.contiguous()
        x, prefix, qkv, middle, gate_up, *kept = tensors
        channel = layer.gate_up.scale
        assert channel is not None

        def sent(site: int, g: Tensor | None) -> Tensor | None:
            """Return what goes through a site's factors besides, float32."""
            if inside is None:
                return None
            assert g is not None
            return inside.back(site, kept[site], g).float()

        product, scale = self._back(gradient, layer.down)
        levels, scale, g_gates = kernels.gate_back_round(
            *(product, scale, gate_up, channel, sent(DOWN, gradient)),
            plain=inside.dtype if inside else None,
        )
        product = self._multiplied_back(levels, layer.gate_up)
        g_middle = kernels.norm_back(
            *(product, scale, middle, layer.feed_norm, sizes.epsilon, gradient),
            added=sent(GATE_UP, g_gates),
        )
        g_read = kernels.rescale(
            *self._back(g_middle, layer.output), None, rest=sent(OUTPUT, g_middle)
        )
        g_qkv, g_prefix = kernels.attend_back(g_read, qkv, prefix, rows, sizes)
        kernels.rotate(g_qkv, rows, sizes, -1.0)
        product, scale = self._back(g_qkv, layer.qkv)
        g_x = kernels.norm_back(
            *(product, scale, x, layer.attention_norm, sizes.epsilon, g_middle),
            added=sent(QKV, g_qkv),
        )
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
        packed = kernels.int8
        if packed is not None and packed.fits(matrix.values):
            weights = self._laid.forward(matrix.values)
            scales = scale, matrix.scale, matrix.bias
            if isinstance(packed, Tiles):
                return packed.product(levels, weights, *scales, rest, half=half)
            return packed.product(levels, weights, *scales, rest)
        product = multiplied(levels, matrix.values.T)
        return kernels.rescale(product, scale, matrix.scale, matrix.bias, rest)

    def _back(self, gradient: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
        levels, scale = self._kernels.round_rows(gradient, matrix.scale)
        return self._multiplied_back(levels, matrix), scale

    def _multiplied_back(self, levels: Tensor, matrix: Matrix) -> Tensor:
        packed = self._kernels.int8
        if packed is not None and packed.fits(matrix.values):
            return packed.product(levels, self._laid.back(matrix.values))
        return multiplied(levels, matrix.values)
