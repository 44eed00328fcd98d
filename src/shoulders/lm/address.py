"""Where a tensor lies, and room for one, for functions in C."""

from __future__ import annotations

import torch
from torch import Tensor


def floats(*shape: int) -> Tensor:
    """Return room for float32 numbers on the CPU, whatever torch's default type is.

    That is the process's: transformers sets it while another thread loads a model in bfloat16.
    """
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def at(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first number; None, which is NULL in C, for no tensor."""
    return None if tensor is None else tensor.data_ptr()
