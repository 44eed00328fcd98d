"""Low-rank factors inside one layer, forwards and backwards (`shoulders.lm.factors`).

The layer's own functions (`shoulders.lm.block` and its equals) say what each of their products has
read and written; here that is changed for the positions that have factors. Weights in int8 read and
write channels that were divided beforehand (`shoulders.lm.smooth`): factors are the LM's own, so
that they mean the same in every precision, and channels are multiplied by the same numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoulders.lm.layer import Layer, Rows, Sizes

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
        each = 2 * SITES
        self.dtype = dtype
        self._matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
        self._places = places
        self._sets = [
            [part.to(dtype) for part in pairs[i : i + each]] for i in range(0, len(pairs), each)
        ]
        self._gradients: list[list[Tensor | None]] = [[None] * each for _ in self._sets]

    def add(self, site: int, x: Tensor, y: Tensor) -> Tensor:
        """Add `x A B` to what a site has written, `y [t, n]`, in place.

        Returns:
            `x [t, k]` as it was multiplied, which `back` needs.
        """
        matrix = self._matrices[site]
        x = (x if matrix.reads is None else x * matrix.reads).to(self.dtype)
        for places, pairs in zip(self._places, self._sets, strict=True):
            down, up = pairs[2 * site], pairs[2 * site + 1]
            added = _product(x if places is None else x[places], down, up)
            added = added if matrix.writes is None else added / matrix.writes
            if places is None:
                y += added
            else:
                y.index_add_(0, places, added.to(y.dtype))
        return x

    def back(self, site: int, x: Tensor, gradient: Tensor) -> Tensor:
        """Return what the gradient of `y [t, n]` sends to `x [t, k]`, and note that of the pairs.

        Args:
            site: which.
            x: what `add` returned.
            gradient: of `y`.
        """
        matrix = self._matrices[site]
        gradient = gradient if matrix.writes is None else gradient / matrix.writes
        gradient = gradient.to(self.dtype)
        through: Tensor | None = None
        for places, pairs, noted in zip(self._places, self._sets, self._gradients, strict=True):
            down, up = pairs[2 * site], pairs[2 * site + 1]
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
        if through is None:
            return torch.zeros_like(x)
        return through if matrix.reads is None else through * matrix.reads

    def gradients(self) -> list[Tensor]:
        """Return the gradients of all pairs, in their order, float32; every site must be back."""
        every = [gradient for noted in self._gradients for gradient in noted]
        return [gradient.float() for gradient in every if gradient is not None]


class Work(NamedTuple):
    """What one call of a layer's functions works on.

    Attributes:
        layer: its frozen matrices.
        rows: where the packed rows lie.
        sizes: its constants.
        inside: low-rank factors of its products, or None.
    """

    layer: Layer
    rows: Rows
    sizes: Sizes
    inside: Inside | None = None


def _product(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return `x A B`, `[t, n]`; a position's sums do not tell how many others stand beside it."""
    t = len(x)
    if t < MANY:
        x = torch.cat([x, x.new_zeros(MANY - t, x.shape[1])])
    return ((x @ down) @ up)[:t]
