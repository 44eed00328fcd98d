"""The LM's head for training in int8 where the processor has AMX: losses without kept logits.

The head's weights are rounded to bfloat16, which is what an LM is identified by; states and the
gradients of logits are split into two bfloat16 each, which hold 16 bits of a float32 together. A
loss's gradient is a multiple of what is known as soon as the logits are, so both are computed at
once and no logits are kept (the idea of Liger Kernel's fused cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoulders.lm.kernels import Kernels, available, fits_tiles, packed


class Head:
    """A head `[vocabulary, d]` without bias, packed for tiles."""

    def __init__(self, kernels: Kernels, weight: Tensor) -> None:
        rounded = weight.detach().bfloat16()
        self._kernels = kernels
        self._forward, self._back = packed(rounded), packed(rounded.T)

    @classmethod
    def of(cls, head: Any) -> Head | None:
        """Pack a linear layer, or return None where that does not fit or there are no tiles."""
        weight, kernels = head.weight, available()
        if kernels is None or not kernels.tiles or getattr(head, "bias", None) is not None:
            return None
        plain = weight.dtype == torch.float32 and weight.device.type == "cpu"
        return cls(kernels, weight) if plain and fits_tiles(weight.bfloat16()) else None

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return negative log-likelihoods `[n]` of `targets [n]`, for float32 states `[n, d]`."""
        losses: Tensor = _HeadLosses.apply(
            states, targets, self._kernels, self._forward, self._back
        )
        return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, targets: Tensor, kernels: Kernels, head: Tensor, back: Tensor
    ) -> Tensor:
        wanted = back if ctx.needs_input_grad[0] else None
        losses, gradient = kernels.head_losses(
            states.contiguous(), head, wanted, targets.contiguous()
        )
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return own * gradients[0][:, None], None, None, None, None
