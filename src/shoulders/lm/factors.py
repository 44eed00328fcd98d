"""Low-rank changes of the products inside the LM's layers: beside the weights, never in them.

Where a layer multiplies `x W^T`, a skill's rows go on with `x W^T + x A B`: LoRA (Hu et al. 2021,
arXiv 2106.09685) that is never merged, so that the weights stay what they are and rows of other
skills in the same batch have pairs of their own, or none. Products that read the same states
(query, key and value; gate and up) share their `A`: together they are one *site*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Pair = tuple[Tensor, Tensor]  # `A [k, r]` and `B [r, n]` of one site of one layer


class Site(NamedTuple):
    """Products of every layer that read the same states.

    Attributes:
        names: of the linear layers inside a decoder layer.
        reads: how many channels they read, `k`.
        writes: how many each of them writes; their sum is `n`.
    """

    names: tuple[str, ...]
    reads: int
    writes: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The pairs of one producer; rows that share them are computed together.

    Attributes:
        sites: of the LM.
        down: `A` of each site, `[layers, k, r]`.
        up: `B` of each site, `[layers, r, n]`.
    """

    sites: tuple[Site, ...]
    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]

    def pairs(self) -> list[tuple[Pair, ...]]:
        """Return for each layer `A [k, r]` and `B [r, n]` of each site.

        All at once: taken one by one, every layer's gradient would be as large as all layers'.
        """
        both = [
            list(zip(down.unbind(), up.unbind(), strict=True))
            for down, up in zip(self.down, self.up, strict=True)
        ]
        return list(zip(*both, strict=True))
