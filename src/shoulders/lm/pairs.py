"""Call `pairs.c`: products on processors with AVX2 that have no instructions for int8.

There torch multiplies int8 one by one, and this is up to twice as fast as floats. Weights are
packed once. A row of a result depends on that row alone, to the last bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shoulders.lm.address import at, floats
from shoulders.lm.tiles import GROUP, PANEL, WITHIN

ACROSS = 16  # columns of a panel, as in pairs.c


class Pairs:
    """The compiled functions; tensors are contiguous. Methods are those of `Tiles`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.pair_product.argtypes = [*[pointer] * 8, *[size] * 3]
        library.wide_product.argtypes = [*[pointer] * 3, *[size] * 3]

    @staticmethod
    def fits(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
        """Tell whether a weight `[n, k]` and its transpose can be packed, as int8 or bfloat16."""
        known = (dtype or weight.dtype) in (torch.int8, torch.bfloat16)
        return known and weight.dim() == 2 and all(size % ACROSS == 0 for size in weight.shape)

    @staticmethod
    def packed(weight: Tensor) -> Tensor:
        """Return weights `[n, k]` as `[n / 16, k / 2, 16, 2]` (int8) or `[n / 16, k, 16, 1]`.

        Those of int8 are read as pairs of neighbours in `k`, those of bfloat16 one by one.
        """
        (n, k), beside = weight.shape, 2 // weight.element_size()
        panels = weight.reshape(n // ACROSS, ACROSS, k // beside, beside)
        return panels.transpose(1, 2).contiguous()

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
            *(at(x), at(weights), at(scale), at(channel), at(bias), at(rest)),
            *(at(y), at(room), m, n, k),
        )
        return y

    def wide_product(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return float32 `x [m, k]` times packed bfloat16 weights `[n, k]`."""
        (m, k), n = x.shape, len(weights) * ACROSS
        y = floats(m, n)
        self._c.wide_product(at(x), at(weights), at(y), m, n, k)
        return y

    def head_losses(
        self, states: Tensor, weights: Tensor, back: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return losses `[m]` of `targets [m]` and, with `back`, their gradients `[m, k]`.

        As `Tiles.head_losses`.
        """
        losses, gradients = [], []
        for some, wanted in zip(states.split(GROUP), targets.split(GROUP), strict=True):
            likely = torch.log_softmax(self.wide_product(some, weights), 1)
            losses.append(-likely.gather(1, wanted[:, None])[:, 0])
            if back is not None:
                own = likely.exp_()
                own[torch.arange(len(own)), wanted] -= 1
                gradients.append(self.wide_product(own, back))
        return torch.cat(losses), torch.cat(gradients) if gradients else None
