"""Where a tensor lies, for functions in C."""

from __future__ import annotations

from torch import Tensor


def at(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first number; None, which is NULL in C, for no tensor."""
    return None if tensor is None else tensor.data_ptr()
