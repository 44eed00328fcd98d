"""The LM's linear layers in 8-bit integers: weights once, activations and gradients per row.

Processors with VNNI or AMX multiply int8 about four times as fast as float32, and a frozen
weight need be rounded only once. Each output channel of a weight has its own scale, each row of
an activation its own (LLM.int8(), arXiv 2208.07339, without its float outliers): a row's
result depends on that row alone, whatever stands beside it (promise 3).

The gradient with respect to the activations goes through the same integers: `g W` is computed
from `g` times the channel scales, rounded row by row. There is no gradient for the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoulders.lm.block import Matrix, multiplied, rounded, times, times_back
from shoulders.lm.kernels import available


class Int8Linear(nn.Module):
    """`x W^T + b` with `W` in int8, for inputs `[..., k]`, outputs `[..., n]` in `x`'s dtype.

    Attributes:
        weight: `[n, k]` int8, never trained.
        scale: `[n]` float32, what one level of a channel is worth.
        bias: `[n]` or None.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        levels, scale = rounded(weight.detach())
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features, self.in_features = weight.shape

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
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is head:
                continue
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child.weight, child.bias))
            elif isinstance(child, Conv1D):  # GPT-2 stores [k, n]
                setattr(parent, name, Int8Linear(child.weight.T, child.bias))


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
