"""Weights packed when they are first multiplied, once for each direction."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Laid:
    """Packed copies of frozen weights, by where those lie.

    An LM that is read has one copy more of its layers' weights, one trained through two.
    """

    def __init__(self, packed: Callable[[Tensor], Tensor]) -> None:
        self._pack = packed
        self._packed: dict[tuple[int, bool], Tensor] = {}

    def forward(self, weight: Tensor) -> Tensor:
        """Return `weight [n, k]` packed, for `x W^T`."""
        return self._of(weight, back=False)

    def back(self, weight: Tensor) -> Tensor:
        """Return its transpose packed, for `g W`."""
        return self._of(weight, back=True)

    def _of(self, weight: Tensor, *, back: bool) -> Tensor:
        key = weight.data_ptr(), back
        found = self._packed.get(key)
        if found is None:  # two threads may both pack it: the first one's stays, at its address
            found = self._packed.setdefault(key, self._pack(weight.T if back else weight))
        return found
