"""Low-rank updates and their gradients, against the formula in torch's own operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoulders.lm.updates import EPSILON, MANY, Matrices, Updates, updated

D, R, LAYERS = 24, 3, 2


def plain(x: Tensor, down: Tensor, up: Tensor, unit: Tensor) -> Tensor:
    normal = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return x + unit * (normal @ down @ up)


def make_matrices(seed: int) -> Matrices:
    random = torch.Generator().manual_seed(seed)
    down = torch.randn(LAYERS, D, R, generator=random)
    up = torch.randn(LAYERS, R, D, generator=random)
    return Matrices(down.requires_grad_(), up.requires_grad_(), torch.tensor([0.5, 2.0]))


@pytest.mark.parametrize("t", [1, MANY - 1, MANY, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_gradients_are_those_of_the_formula(t: int, dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(t)
    states = torch.randn(t, D, generator=random).mul(3.0).to(dtype).requires_grad_()
    towards = torch.randn(t, D, generator=random).to(dtype)
    down, up, unit = make_matrices(0).pairs()[1]
    results = []
    wide = states.detach().double().requires_grad_()
    for x, function in ((states, updated), (wide, plain)):
        own = x.dtype if function is plain else torch.float32
        a, b, u = (m.detach().to(own).requires_grad_() for m in (down, up, unit))
        y = function(x, a, b, u)
        results.append((y.detach(), *torch.autograd.grad(y, (x, a, b), towards.to(y))))
    with torch.no_grad():
        again = updated(states, down, up, unit)
    right = results[1]
    for got, wanted in (*zip(*results, strict=True), (again, right[0])):
        room = tolerance * float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=room)


def test_rows_of_several_skills_teach_their_own_matrices_alone() -> None:
    first, second = make_matrices(1), make_matrices(2)
    several = Updates((first, second), (0, 1, -1))
    owner = torch.tensor([0, 0, 1, 2, 1, 0])
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(3), requires_grad=True)
    towards = torch.randn(6, D, generator=torch.Generator().manual_seed(4))
    placed = several.placed(owner)
    y = placed.applied(1, placed.applied(0, x))
    leaves = (x, first.down, first.up, second.down, second.up)
    mine = torch.autograd.grad(y, leaves, towards)

    expected = []
    for place, row in enumerate(owner.tolist()):
        state = x[place : place + 1]
        for layer in range(LAYERS):
            if row < 2:
                state = plain(state, *(first, second)[row].pairs()[layer])
        expected.append(state)
    joined = torch.cat(expected)
    right = torch.autograd.grad(joined, leaves, towards)
    torch.testing.assert_close(y, joined)
    for a, b in zip(mine, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert torch.equal(y[3], x[3])
