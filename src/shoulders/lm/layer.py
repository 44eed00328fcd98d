"""What one Llama-style layer computes with, and on: its frozen matrices, and rows laid end to end.

Shapes: `t` packed positions of width `d`; `b` rows of at most `s` positions; `c` positions
before them that a row also sees (its prefix, then a shared prompt's own positions); `h` query
heads and `g` key/value heads of width `e`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A frozen weight `[n, k]`: floating point, or int8 with `scale` `[n]`.

    `reads [k]` and `writes [n]` are what its channels were divided by before it was rounded, None
    for nothing (`shoulders.lm.smooth`).
    """

    values: Tensor
    scale: Tensor | None
    bias: Tensor | None
    reads: Tensor | None = None
    writes: Tensor | None = None


class Layer(NamedTuple):
    """What one layer computes with; `qkv` and `gate_up` are several matrices in one."""

    attention_norm: Tensor
    qkv: Matrix
    output: Matrix
    feed_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Mask:
    """What padded rows see, made when it is first asked for: compiled layers need its shape alone.

    Of one row of 8,192 positions it would be a quarter of a gigabyte.

    Attributes:
        shape: `(b, 1, s, c + s)`.
    """

    def __init__(self, shape: tuple[int, int, int, int], make: Callable[[], Tensor]) -> None:
        self.shape, self._make = shape, make

    @functools.cached_property
    def values(self) -> Tensor:
        """Zeros where a key is seen, the dtype's minimum elsewhere."""
        return self._make()


class Rows(NamedTuple):
    """Where the rows of a pack lie; the same for every layer.

    Attributes:
        cos, sin: `[t, 1, e / 2]` rotary tables of every position.
        spread: `[b * s]`, packed position of every padded place (any position for a pad).
        packed: `[t]`, padded place of every packed position.
        mask: of `[b, 1, s, c + s]`, which keys each padded place sees.
        start, length: `[b]`, packed position where each row begins, and how many it has.
        seen, slot: `[b]`, where the prefix is a cache with room to spare: how many of its
            positions each row sees, and which of its rows is theirs; else None.
    """

    cos: Tensor
    sin: Tensor
    spread: Tensor
    packed: Tensor
    mask: Mask
    start: Tensor
    length: Tensor
    seen: Tensor | None = None
    slot: Tensor | None = None


class Sizes(NamedTuple):
    """Constants of a layer: heads, key/value heads, head width, norm epsilon, shared positions."""

    heads: int
    kv_heads: int
    width: int
    epsilon: float
    shared: int
