"""Low-rank updates of the states between the LM's layers: beside the weights, never in them.

What layer `l` has written, `x`, goes on as `x + u B A n(x)`: `n` divides a position by its root
mean square, `A` and `B` are a small trained pair of matrices for every layer, and `u` is the
layer's own unit. It is an adapter in series (Houlsby et al. 2019, arXiv 1902.00751), without its
nonlinearity and once a layer. Rows of other skills in the same batch go on as they are, or with
matrices of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoulders.lm.factors import Factors
from shoulders.lm.factors import Pair as SitePair

EPSILON = 1e-6
# From so many positions on a product's sums are the same, whatever their number: see `steady`.
MANY = 16

Pair = tuple[Tensor, Tensor, Tensor]  # one layer's `A` and `B`, and its unit


@dataclass(frozen=True, slots=True, eq=False)
class Matrices:
    """The pairs of one producer; rows that share them are computed together.

    Attributes:
        down: `A` of every layer, `[layers, d, r]`.
        up: `B`, `[layers, r, d]`.
        unit: `u`, `[layers]`.
    """

    down: Tensor
    up: Tensor
    unit: Tensor

    def pairs(self) -> list[Pair]:
        """Return `A` `[d, r]`, `B` `[r, d]` and `u` `[]` of each layer.

        All at once: taken one by one, every layer's gradient would be as large as all layers'.
        """
        return list(zip(self.down.unbind(), self.up.unbind(), self.unit.unbind(), strict=True))


@dataclass(frozen=True, slots=True)
class Updates:
    """The updates of `b` rows.

    Attributes:
        sets: the matrices that rows use, each once: of the states between layers, or of the
            products inside them.
        of: for each row the index of its own among them, -1 for a row without updates.
    """

    sets: tuple[Matrices | Factors, ...]
    of: tuple[int, ...]

    @classmethod
    def alike(cls, matrices: Matrices | Factors, rows: int) -> Updates:
        """Return updates of `rows` rows with the same matrices."""
        return cls((matrices,), (0,) * rows)

    @classmethod
    def stack(cls, several: Sequence[Updates | None], rows: Sequence[int]) -> Updates | None:
        """Join updates along the rows; None stands for so many `rows` without any."""
        sets: list[Matrices | Factors] = []
        of: list[int] = []
        for own, count in zip(several, rows, strict=True):
            if own is None:
                of += [-1] * count
                continue
            sets += [matrices for matrices in own.sets if matrices not in sets]
            of += [-1 if i < 0 else sets.index(own.sets[i]) for i in own.of]
        return cls(tuple(sets), tuple(of)) if sets else None

    def select(self, rows: Sequence[int]) -> Updates:
        """Return the updates of some rows, in that order."""
        return Updates(self.sets, tuple(self.of[i] for i in rows))

    def repeat(self, n: int) -> Updates:
        """Return these updates with every row `n` times."""
        return self.select([row for row in range(len(self.of)) for _ in range(n)])

    def placed(self, owner: Tensor) -> Placed:
        """Return them for positions of the rows `owner`, `[t]` int64."""
        return Placed(self, owner)


class Placed:
    """Updates of positions: which matrices belong to which of them.

    Attributes:
        sets: the matrices, each once.
        which: `[t]` int64, the index of each position's own, -1 for none.
    """

    def __init__(self, updates: Updates, owner: Tensor) -> None:
        self.sets = updates.sets
        self.which = torch.tensor(updates.of, device=owner.device)[owner]

    @functools.cached_property
    def _used(self) -> list[tuple[Matrices | Factors, Tensor | None]]:
        """The sets in use, and their positions; None for all, which need no picking out."""
        found: list[tuple[Matrices | Factors, Tensor | None]] = []
        for index, own in enumerate(self.sets):
            mine = self.which == index
            if bool(mine.any()):
                found.append((own, None if bool(mine.all()) else mine.nonzero()[:, 0]))
        return found

    @functools.cached_property
    def _between(self) -> list[tuple[list[Pair], Tensor | None]]:
        return [(own.pairs(), at) for own, at in self._used if isinstance(own, Matrices)]

    @functools.cached_property
    def within(self) -> list[tuple[Factors, list[tuple[SitePair, ...]], Tensor | None]]:
        """The factors in use with their pairs of each layer, and their positions."""
        return [(own, own.pairs(), at) for own, at in self._used if isinstance(own, Factors)]

    def applied(self, layer: int, x: Tensor) -> Tensor:
        """Return the states `[t, d]` that a layer has written, with their updates."""
        for pairs, places in self._between:
            if places is None:
                x = updated(x, *pairs[layer])
            else:
                x = x.index_copy(0, places, updated(x[places], *pairs[layer]))
        return x

    def inside(self, layer: int) -> tuple[list[Tensor | None], list[Tensor]]:
        """Return the positions of every set of factors, and its pairs, as `Inside` takes them."""
        places = [at for _, _, at in self.within]
        return places, [t for _, pairs, _ in self.within for pair in pairs[layer] for t in pair]


def updated(x: Tensor, down: Tensor, up: Tensor, unit: Tensor) -> Tensor:
    """Return `x + u B A n(x)` of states `[t, d]`; `down [d, r]`, `up [r, d]`, `unit []`."""
    if torch.is_grad_enabled():
        new: Tensor = _Updated.apply(x, down, up, unit)
        return new
    t, (normal, _) = len(x), _normal(x)
    if t < MANY:
        # A position's sums must not tell how many others stand beside it (promise 3).
        normal = torch.cat([normal, normal.new_zeros(MANY - t, x.shape[1])])
    return x + ((normal @ down.to(x)) @ (up * unit).to(x))[:t]


def _normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `n(x)` in the type of `x [t, d]`, and what it was multiplied by, `[t, 1]` float32."""
    wide = x.float()
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
    inverse = torch.rsqrt(square / x.shape[1] + EPSILON)
    return (wide * inverse).to(x.dtype), inverse


class _Updated(torch.autograd.Function):
    """`updated` with its way back written out: a third of autograd's passes over the states."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, unit: Tensor) -> Tensor:
        normal, inverse = _normal(x)
        read = normal @ down.to(x)
        ctx.save_for_backward(normal, inverse, read, down, up, unit)
        return torch.addmm(x, read, (up * unit).to(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        normal, inverse, read, down, up, unit = ctx.saved_tensors
        gradient = gradients[0]
        with torch.no_grad():
            g_read = gradient @ (up * unit).to(gradient).T
            g_up = (read.T @ gradient).to(up) * unit
            g_down = (normal.T @ g_read).to(down)
            through, normal = (g_read @ down.to(gradient).T).float(), normal.float()
            along = (torch.linalg.vecdot(through, normal) / normal.shape[1])[:, None]
            g_x = inverse * torch.addcmul(through, normal, along, value=-1)
        return gradient + g_x.to(gradient), g_down, g_up, None
