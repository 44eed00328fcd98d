"""Low-rank updates of the states between the LM's layers: beside the weights, never in them.

What layer `l` has written, `x`, goes on as `x + u B A n(x)`: `n` divides a position by its root
mean square, `A` and `B` are a small trained pair of matrices for every layer, and `u` is the
layer's own unit. It is an adapter in series (Houlsby et al. 2019, arXiv 1902.00751), without its
nonlinearity and once a layer. Rows of other skills in the same batch go on as they are, or with
matrices of their own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
        sets: the matrices that rows use, each once.
        of: for each row the index of its own among them, -1 for a row without updates.
    """

    sets: tuple[Matrices, ...]
    of: tuple[int, ...]

    @classmethod
    def alike(cls, matrices: Matrices, rows: int) -> Updates:
        """Return updates of `rows` rows with the same matrices."""
        return cls((matrices,), (0,) * rows)

    @classmethod
    def stack(cls, several: Sequence[Updates | None], rows: Sequence[int]) -> Updates | None:
        """Join updates along the rows; None stands for so many `rows` without any."""
        sets: list[Matrices] = []
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
    def _parts(self) -> list[tuple[list[Pair], Tensor | None]]:
        """The matrices in use, and their positions; None for all, which need no picking out."""
        parts: list[tuple[list[Pair], Tensor | None]] = []
        for index, matrices in enumerate(self.sets):
            mine = self.which == index
            if bool(mine.any()):
                places = None if bool(mine.all()) else mine.nonzero()[:, 0]
                parts.append((matrices.pairs(), places))
        return parts

    def applied(self, layer: int, x: Tensor) -> Tensor:
        """Return the states `[t, d]` that a layer has written, with their updates."""
        for pairs, places in self._parts:
            if places is None:
                x = updated(x, *pairs[layer])
            else:
                x = x.index_copy(0, places, updated(x[places], *pairs[layer]))
        return x


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


class Beside(NamedTuple):
    """Low-rank updates as `layers.c` takes them: `update_t` of every set, and whose they are.

    Attributes:
        table: addresses of each set's matrices, and its rank; None without updates.
        which: `[t]` int64, each position's set, -1 for none.
        rank: the largest.
        parts: what lies at the addresses.
    """

    table: Tensor | None = None
    which: Tensor | None = None
    rank: int = 0
    parts: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, updates: Placed | None) -> Beside:
        """Lay out the updates of positions."""
        if updates is None:
            return cls()
        parts = [
            part.detach().float().contiguous()
            for own in updates.sets
            for part in (own.down, own.up, own.unit)
        ]
        ranks = [own.down.shape[2] for own in updates.sets]
        addresses = torch.tensor([part.data_ptr() for part in parts]).view(-1, 3)
        table = torch.cat([addresses, torch.tensor(ranks)[:, None]], 1).contiguous()
        return cls(table, updates.which, max(ranks), tuple(parts))


class LayerHooks:
    """Applies updates in a Hugging Face model's own layers, for one call at a time.

    The hooks stay on the layers and do nothing unless their thread is inside `applying`.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        self._now = threading.local()
        for number, layer in enumerate(layers):
            # First: transformers' own hooks, which keep states (`taps`), must see updated ones.
            layer.register_forward_hook(self._hook(number), prepend=True)

    @contextmanager
    def applying(self, updates: Updates, owner: Tensor) -> Iterator[None]:
        """Apply them to whatever this thread runs; `owner` `[b, s]` is each position's row."""
        self._now.placed = updates.placed(owner.flatten())
        try:
            yield
        finally:
            self._now.placed = None

    def _hook(self, number: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            placed: Placed | None = getattr(self._now, "placed", None)
            if placed is None:
                return output
            states = output[0] if isinstance(output, tuple) else output
            new = placed.applied(number, states.flatten(0, -2)).view(states.shape)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook
