"""Muon: orthogonal steps of matrices and stacks of them, AdamW for what is not one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoulders.training.configs import OptimizerConfig
from shoulders.training.muon import _turned, _turned_thin, orthogonal, squares
from shoulders.training.optimizer import make_optimizer

SHAPES = [(24, 24), (24, 40), (40, 24), (16, 48), (48, 16)]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    """Against the singular value decomposition: the same directions, every value near one."""
    given = drawn(3, *shape)
    found = orthogonal(given).float()
    assert found.shape == given.shape
    u, sizes, v = torch.linalg.svd(given, full_matrices=False)
    inside = u.mT @ found @ v.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert values[sizes > 0.1 * sizes.max()].min() > 0.5  # a tiny one stays behind
    assert values.max() < 1.3
    assert values.median() == pytest.approx(1, abs=0.3)
    assert (inside - torch.diag_embed(values)).abs().max() < 0.05


def test_the_iteration_of_thin_matrices_is_that_of_others() -> None:
    given = drawn(3, 8, 40)
    found, plain = _turned_thin(given), _turned(given).float()
    assert float((found - plain).norm()) < 0.02 * float(plain.norm())  # that one is in bfloat16
    assert torch.equal(orthogonal(given), found)
    assert torch.equal(orthogonal(given.mT), found.mT)


def test_what_has_no_gradient_yet_does_not_move() -> None:
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def test_a_high_weight_is_squares() -> None:
    weight = drawn(12, 4)
    assert torch.equal(squares(weight), torch.stack(weight.split(4)))
    assert squares(drawn(4, 12)).shape == (1, 4, 12)
    assert squares(drawn(10, 4)).shape == (1, 10, 4)
    assert squares(drawn(5, 4, 3)).shape == (5, 4, 3)


def moved(named: dict[str, Tensor], gradients: list[dict[str, Tensor]], **config: Any) -> Any:
    """Return parameters after an optimizer's steps, given their gradients."""
    own = {name: nn.Parameter(value.clone()) for name, value in named.items()}
    optimizer = make_optimizer(own.items(), OptimizerConfig(**config))
    for step in gradients:
        for name, gradient in step.items():
            own[name].grad = gradient.clone()
        optimizer.step()
    return {name: value.detach() for name, value in own.items()}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon to compare")
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_equal_torch(decay: float) -> None:
    """Matrices as torch's Muon moves them, prompts and biases as its AdamW does."""
    named = {"read.weight": drawn(24, 40), "base": drawn(10, 16), "read.bias": drawn(24)}
    steps = [{n: drawn(*v.shape, seed=s) for n, v in named.items()} for s in range(1, 6)]
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": decay}
    found = moved(named, steps, kind="muon", **settings)
    plain = moved(named, steps, kind="adamw", **settings)
    for name in ("base", "read.bias"):
        torch.testing.assert_close(found[name], plain[name], rtol=1e-5, atol=1e-6)

    weight = nn.Parameter(named["read.weight"].clone())
    peer = torch.optim.Muon([weight], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings)
    for step in steps:
        weight.grad = step["read.weight"].clone()
        peer.step()
    change, theirs = found["read.weight"] - named["read.weight"], weight - named["read.weight"]
    assert (change - theirs).norm() < 0.03 * theirs.norm()  # it iterates in bfloat16 everywhere


def test_a_stack_moves_as_its_matrices_do() -> None:
    stack = {"updates.down": drawn(3, 24, 8)}
    steps = [{"updates.down": drawn(3, 24, 8, seed=s)} for s in range(1, 4)]
    whole = moved(stack, steps, kind="muon", lr=0.1)["updates.down"]
    for layer in range(3):
        alone = {"one.weight": stack["updates.down"][layer].T.contiguous()}
        own = [{"one.weight": s["updates.down"][layer].T.contiguous()} for s in steps]
        found = moved(alone, own, kind="muon", lr=0.1)["one.weight"].T
        torch.testing.assert_close(whole[layer], found, rtol=1e-2, atol=1e-3)
