"""Low-rank updates and factors laid out for `layers.c`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoulders.lm.factors import Factors
from shoulders.lm.inside import SITES
from shoulders.lm.updates import Matrices, Placed


class Beside(NamedTuple):
    """Low-rank changes as `layers.c` takes them: `update_t` of every set, and whose they are.

    Attributes:
        table: addresses of each set's matrices, and its rank; None without any.
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
        laid = [_parts(own) for own in updates.sets]
        table = torch.tensor(
            [[0 if t is None else t.data_ptr() for t in own] + [rank] for own, rank in laid]
        )
        parts = tuple(t for own, _ in laid for t in own if t is not None)
        return cls(table, updates.which, max(rank for _, rank in laid), parts)


def _parts(own: Matrices | Factors) -> tuple[list[Tensor | None], int]:
    """Return a set's matrices in the order of `update_t`, None for what there is not; its rank."""
    found: list[Tensor | None]
    if isinstance(own, Factors):
        pairs = zip(own.down, own.up, strict=True)
        found = [None] * 3 + [part for pair in pairs for part in pair]
        rank = own.down[0].shape[2]
    else:
        found = [own.down, own.up, own.unit, *[None] * (2 * SITES)]
        rank = own.down.shape[2]
    return [None if t is None else t.detach().float().contiguous() for t in found], rank
