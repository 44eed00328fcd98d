"""Low-rank factors inside one layer, forwards and backwards (`shoulders.lm.factors`).

The layer's own functions (`shoulders.lm.block` and its equals) say what each of their products has
read and written; here that is changed for the positions that have factors. Weights in int8 read
channels that were divided beforehand (`shoulders.lm.smooth`): factors are the LM's own, and are
multiplied by the same numbers first, so that they mean the same in every precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoulders.lm.layer import Layer

# The sites of a Llama-style layer, in the order of its modules (`shoulders.lm.factors.sites_of`).
QKV, OUTPUT, GATE_UP, DOWN = range(4)
SITES = 4
# From so many positions on a product's sums are the same, whatever their number: see `steady`.
MANY = 16


class Inside:
    """One layer's factors, placed on the positions that have them.

    Args:
        layer: the frozen matrices.
        places: for each set of pairs its positions, int64; None for all there are.
        pairs: for each set its pairs, site by site: `A, B, A, B, ...`.
        dtype: in which they are multiplied.
    """

    def __init__(
        self,
        layer: Layer,
        places: Sequence[Tensor | None],
        pairs: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> None:
        matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
        each = 2 * len(matrices)
        self.dtype = dtype
        self._matrices, self._places = matrices, places
        self._pairs = [
            [
                (_times(down, matrix.reads).to(dtype), _over(up, matrix.writes).to(dtype))
                for matrix, down, up in zip(matrices, own[::2], own[1::2], strict=True)
            ]
            for own in (pairs[i : i + each] for i in range(0, len(pairs), each))
        ]
        self._gradients: list[list[Tensor | None]] = [[None] * each for _ in self._pairs]

    def add(self, site: int, x: Tensor, y: Tensor) -> Tensor:
        """Add `x A B` to what a site has written, `y [t, n]`, in place.

        Returns:
            `x [t, k]` as it was multiplied, which `back` needs.
        """
        x = x.to(self.dtype)
        for places, pairs in zip(self._places, self._pairs, strict=True):
            down, up = pairs[site]
            if places is None:
                y += _product(x, down, up)
            else:
                y.index_add_(0, places, _product(x[places], down, up).to(y.dtype))
        return x

    def back(self, site: int, x: Tensor, gradient: Tensor) -> Tensor:
        """Return what the gradient of `y [t, n]` sends to `x [t, k]`, and note that of the pairs.

        Args:
            site: which.
            x: what `add` returned.
            gradient: of `y`.
        """
        gradient = gradient.to(self.dtype)
        through: Tensor | None = None
        for places, pairs, noted in zip(self._places, self._pairs, self._gradients, strict=True):
            down, up = pairs[site]
            own, g = (x, gradient) if places is None else (x[places], gradient[places])
            g_read = g @ up.T
            noted[2 * site] = own.T @ g_read
            noted[2 * site + 1] = (own @ down).T @ g
            sent = g_read @ down.T
            if places is None:
                through = sent if through is None else through + sent
            else:
                through = torch.zeros_like(x) if through is None else through
                through.index_add_(0, places, sent)
        return torch.zeros_like(x) if through is None else through

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all pairs, in their order, float32; every site must be back."""
        found = []
        for noted in self._gradients:
            for i, gradient in enumerate(noted):
                assert gradient is not None
                matrix = self._matrices[i // 2]
                wide = gradient.float()
                found.append(_over(wide, matrix.writes) if i % 2 else _times(wide, matrix.reads))
        return found


def _product(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return `x A B`, `[t, n]`; a position's sums do not tell how many others stand beside it."""
    t = len(x)
    if t < MANY:
        x = torch.cat([x, x.new_zeros(MANY - t, x.shape[1])])
    return ((x @ down) @ up)[:t]


def _times(down: Tensor, reads: Tensor | None) -> Tensor:
    return down if reads is None else down * reads[:, None]


def _over(up: Tensor, writes: Tensor | None) -> Tensor:
    return up if writes is None else up / writes
