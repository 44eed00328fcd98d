"""Products of float32 states with bfloat16 weights, on processors that are slow at bfloat16.

There torch multiplies bfloat16 up to nine times slower than float32. Here each product widens
what it reads of the weights, as fast as float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoulders.lm.block import times, times_back
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Matrix
from shoulders.lm.pairs import Pairs


class Wide:
    """The two products with packed weights, where the processor has AVX2 alone."""

    def __init__(self, pairs: Pairs, laid: Laid) -> None:
        self._pairs, self._laid = pairs, laid

    def times(self, x: Tensor, matrix: Matrix) -> Tensor:
        """Return `x W^T + bias`, `[t, k] -> [t, n]`."""
        if not self._fits(x, matrix):
            return times(x, matrix)
        y = self._pairs.wide_product(x.contiguous(), self._laid.forward(matrix.values))
        return y if matrix.bias is None else y + matrix.bias

    def back(self, gradient: Tensor, matrix: Matrix) -> Tensor:
        """Return the gradient of `x`, `[t, n] -> [t, k]`."""
        if not self._fits(gradient, matrix):
            return times_back(gradient, matrix)
        return self._pairs.wide_product(gradient.contiguous(), self._laid.back(matrix.values))

    def _fits(self, x: Tensor, matrix: Matrix) -> bool:
        halves = x.dtype == torch.float32 and matrix.values.dtype == torch.bfloat16
        return halves and self._pairs.fits(matrix.values)
