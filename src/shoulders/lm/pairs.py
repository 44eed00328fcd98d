"""Call `pairs.c`: products of int8 on processors with AVX2 that have no instructions for int8.

There torch multiplies int8 one by one, and floats half as fast as this. Weights are packed once. A
row of a result depends on that row alone, to the last bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shoulders.lm.tiles import PANEL, WITHIN

ACROSS = 16  # columns of a panel, as in pairs.c


class Pairs:
    """The compiled functions; tensors are contiguous. The same methods as int8's of `Tiles`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.pair_product.argtypes = [*[pointer] * 8, *[size] * 3]

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Tell whether an int8 weight `[n, k]` and its transpose can be packed."""
        sizes = weight.shape
        return (
            weight.dtype == torch.int8 and len(sizes) == 2 and all(s % ACROSS == 0 for s in sizes)
        )

    @staticmethod
    def packed(weight: Tensor) -> Tensor:
        """Return int8 weights `[n, k]` as `[n / 16, k / 2, 16, 2]`: pairs of neighbours in `k`."""
        n, k = weight.shape
        return weight.reshape(n // ACROSS, ACROSS, k // 2, 2).transpose(1, 2).contiguous()

    def product(
        self,
        x: Tensor,
        weights: Tensor,
        scale: Tensor | None = None,
        channel: Tensor | None = None,
        bias: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> Tensor:
        """Return levels `x [m, k]` times packed weights `[n, k]`, as `Tiles.product` does."""
        (m, k), n = x.shape, len(weights) * ACROSS
        y = torch.empty(m, n, dtype=torch.int32 if scale is None else torch.float32)
        room = torch.empty(PANEL * k + WITHIN, dtype=torch.int8)
        self._c.pair_product(
            *(_at(x), _at(weights), _at(scale), _at(channel), _at(bias), _at(rest)),
            *(_at(y), _at(room), m, n, k),
        )
        return y


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
