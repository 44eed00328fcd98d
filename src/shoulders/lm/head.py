"""The LM's head in packed products (AMX, or AVX2 alone): logits, and losses that keep none.

The head's weights are taken in bfloat16, which is what an LM is identified by; with AMX states and
the gradients of logits are split into two bfloat16 each, which hold 16 bits of a float32. A
loss's gradient is a multiple of what is known as soon as the logits are, so both are computed at
once and no logits are kept (the idea of Liger Kernel's fused cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from shoulders.lm.kernels import available
from shoulders.lm.pairs import Pairs
from shoulders.lm.tiles import Tiles


class Head:
    """A head `[vocabulary, d]` without bias, packed; for training once more, turned."""

    def __init__(self, products: Tiles | Pairs, weight: Tensor) -> None:
        self._products, self._weight, self.tokens = products, weight, len(weight)
        self._forward = products.packed(weight.bfloat16())

    @classmethod
    def of(cls, head: Any) -> Head | None:
        """Pack a linear layer, or return None where that does not fit or torch is as fast."""
        kernels = available()
        if kernels is None or kernels.int8 is None or getattr(head, "bias", None) is not None:
            return None
        weight = head.weight.detach()
        plain = weight.dtype in (torch.float32, torch.bfloat16) and weight.device.type == "cpu"
        fits = plain and kernels.int8.fits(weight, torch.bfloat16)
        return cls(kernels.int8, weight) if fits else None

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits `[n, vocabulary]` of states `[n, d]`; no gradient goes back."""
        return self._products.wide_product(states.detach().float().contiguous(), self._forward)

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Return negative log-likelihoods `[n]` of `targets [n]`, for states `[n, d]`."""
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.tokens:
            raise IndexError(f"a target is none of the {self.tokens} tokens that the LM has")
        losses: Tensor = _HeadLosses.apply(states.float(), targets, self)
        return losses

    @functools.cached_property
    def _back(self) -> Tensor:
        return self._products.packed(self._weight.bfloat16().T)

    def losses_and_gradient(
        self, states: Tensor, targets: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return losses `[n]` and, if wanted, their gradients `[n, d]`."""
        back = self._back if gradient else None
        return self._products.head_losses(
            states.contiguous(), self._forward, back, targets.contiguous()
        )


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: Head) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses, gradient = head.losses_and_gradient(states, targets, gradient=wanted)
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (own,) = ctx.saved_tensors
        return own * gradients[0][:, None], None, None
