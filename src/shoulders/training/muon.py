"""Muon for the weight matrices of a small trained network, AdamW for the rest of it.

Within some hundreds of steps a matrix that is moved in all its directions alike learns more than
one that follows each number's own gradient (docs/log.md; within fewer than 100 it learns less):
Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum's nearest
orthogonal matrix as the step. Step sizes are those of Liu et al. 2025 (arXiv 2502.16982), so that a
number of a matrix moves by a fifth of the rate and rates are of AdamW's order.

torch's own Muon takes single matrices only. Here a stack of them, as every layer of the LM has one,
is one tensor, and one optimizer has one state to save, whatever it moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from shoulders.lm.processor import fast_bfloat16

MOMENTUM = 0.95
ITERATIONS = 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # of the iteration: Jordan's, steepest at zero
MOVED = 0.2  # root mean square of a matrix's step, of its rate
EPSILON = 1e-7


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Tell weight matrices, alone or one for each layer, from vectors, prompts and prefixes."""
    return parameter.ndim == 3 or (parameter.ndim == 2 and name.endswith("weight"))


class Muon(torch.optim.Optimizer):
    """Moves matrices by their orthogonalised momentum, everything else as AdamW.

    Args:
        groups: one parameter each, with its `lr` and whether it is a `matrix`.
        betas: of AdamW.
        weight_decay: of both, times the rate.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], betas: tuple[float, float], weight_decay: float
    ) -> None:
        defaults = {"betas": betas, "weight_decay": weight_decay, "matrix": False}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; `closure` is not taken."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._turn if group["matrix"] else self._follow)(parameter, group)

    def _turn(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = squares(gradient.lerp(momentum, MOMENTUM))
        size = MOVED * max(ahead.shape[1:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        turned = orthogonal(ahead).view_as(parameter).to(parameter)
        parameter.add_(turned, alpha=-group["lr"] * size)

    def _follow(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        moments, squared, count = state["exp_avg"], state["exp_avg_sq"], state["step"]
        beta1, beta2 = group["betas"]
        adamw([parameter], [gradient], [moments], [squared], [], [count], amsgrad=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
              eps=1e-8, maximize=False)  # fmt: skip


def squares(weight: Tensor) -> Tensor:
    """Return the matrices that a weight consists of, `[k, n, m]`.

    One that is a whole number of times as high as wide is so many squares: queries, keys and values
    in one product, or the projection to every layer's.
    """
    if weight.ndim == 3:
        return weight
    high, wide = weight.shape
    return weight.view(-1, wide, wide) if high % wide == 0 else weight[None]


def orthogonal(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrix of each of `[k, n, m]`, roughly.

    Five steps of a Newton-Schulz iteration leave singular values between 0.7 and 1.2 (Jordan 2024);
    what is zero stays zero.
    """
    lying = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if lying else matrices
    thin = 2 * x.shape[1] <= x.shape[2]
    x = _turned_thin(x.float()) if thin else _turned(x)
    return x.mT if lying else x


def _turned(x: Tensor) -> Tensor:
    """Iterate on the matrices themselves, `x <- (a + b x x' + c (x x')^2) x`."""
    kind = torch.bfloat16 if fast_bfloat16(x.device.type) else torch.float32
    x = x.to(kind)
    x = x / torch.linalg.matrix_norm(x.float(), keepdim=True).clamp_min(EPSILON).to(kind)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


def _turned_thin(x: Tensor) -> Tensor:
    """Iterate on `x x'` alone, which is much smaller: each step is a polynomial of it, times `x`.

    Of a pair of rank 48 that is a fifth of the work, and float32 costs nothing.
    """
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(EPSILON)
    gram = x @ x.mT
    unit = torch.eye(gram.shape[1], device=x.device)
    whole = unit.expand_as(gram)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        step = torch.baddbmm(b * gram, gram, gram, alpha=c) + a * unit
        whole = step @ whole
        gram = step @ gram @ step
    return whole @ x
