"""The LM's linear layers in 8-bit integers: weights once, activations and gradients per row.

Processors with VNNI or AMX multiply int8 about four times as fast as float32, those with AVX2
alone up to twice (`shoulders.lm.pairs`), and a frozen weight need be rounded only once. Each output
channel of a weight has its own scale, each row of an activation its own (LLM.int8(), arXiv
2208.07339, without its float outliers): a row's result depends on that row alone, whatever
stands beside it (promise 3).

The gradient with respect to the activations goes through the same integers: `g W` is computed
from `g` times the channel scales, rounded row by row. There is no gradient for the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoulders.lm.block import multiplied, rounded, times, times_back
from shoulders.lm.kernels import available
from shoulders.lm.layer import Matrix


class Int8Linear(nn.Module):
    """`x W^T + b` with `W` in int8, for inputs `[..., k]`, outputs `[..., n]` in `x`'s dtype.

    Attributes:
        weight: `[n, k]` int8, never trained.
        scale: `[n]` float32, what one level of a channel is worth.
        bias: `[n]` or None.
        reads: `[k]`, what its input's channels were divided by before (`shoulders.lm.smooth`), or
            None.
        writes: `[n]`, likewise its output's.
    """

    scale: Tensor
    reads: Tensor | None
    writes: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        reads: Tensor | None = None,
        writes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.register_buffer("reads", reads)
        self.register_buffer("writes", writes)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

    @classmethod
    def of(cls, linear: Any) -> Self:
        """Round a linear layer's weight."""
        # GPT-2's are [k, n].
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        levels, scale = rounded(weight.detach())
        divided = (getattr(linear, name, None) for name in ("reads", "writes"))
        return cls(levels, scale[:, 0].contiguous(), linear.bias, *divided)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b`."""
        y: Tensor = _Int8Product.apply(x, Matrix(self.weight, self.scale, self.bias))
        return y

    def dequantised(self) -> Tensor:
        """Return the weight that this layer stands for, `[n, k]` float32."""
        return self.weight.float() * self.scale[:, None]


def to_int8(model: Any) -> None:
    """Replace every linear layer of a Hugging Face LM, or of one of its layers, in place.

    Its embedding table and its head stay as they are: the gradient of the logits has one large
    entry a row, beside which rounding would lose all others.
    """
    for one in linears(model):
        setattr(one.parent, one.child, Int8Linear.of(getattr(one.parent, one.child)))


class Place(NamedTuple):
    """Where a linear layer stands: its name in the LM, and the module that it is a child of."""

    name: str
    parent: nn.Module
    child: str


def linears(model: Any) -> list[Place]:
    """Return the places of an LM's linear layers, without its head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        Place(f"{outer}.{name}" if outer else name, parent, name)
        for outer, parent in model.named_modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | Conv1D) and child is not head
    ]


class _Int8Product(torch.autograd.Function):
    """`x W^T` and, backwards, `g W`, each as one integer product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        flat = x.reshape(-1, x.shape[-1])
        kernels = available() if x.dtype == torch.float32 and not x.is_cuda else None
        if kernels is None:
            y = times(flat, matrix)
        else:
            levels, scale = kernels.round_rows(flat)
            product = multiplied(levels, matrix.values.T)
            y = kernels.rescale(product, scale, matrix.scale, matrix.bias)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        g = gradients[0]
        gx = times_back(g.reshape(-1, g.shape[-1]), ctx.matrix)
        return gx.view(*g.shape[:-1], -1), None
