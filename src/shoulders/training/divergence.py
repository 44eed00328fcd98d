"""What training refuses to go on with: losses that are no numbers, tensors that do not move."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from shoulders.errors import DivergedError

# After this many steps every trained tensor must have moved. (A zero-initialised projection
# keeps what stands before it still during the first step.)
MOVED_BY = 3


def check_step(step: int, loss: float, norm: float, checkpoints: Path) -> None:
    """Raise `DivergedError` for a loss or a gradient norm that is no number."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = f" (the newest checkpoint is in {checkpoints})" if checkpoints.exists() else ""
        raise DivergedError(
            f"step {step}: loss is {loss}, gradient norm {norm}: training has diverged; "
            f"lower the learning rate{kept}"
        )


def check_validation(step: int, loss: float) -> None:
    """Raise `DivergedError` for a validation loss that is no number."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"step {step}: validation loss is {loss}: training has diverged; "
            "lower the learning rate"
        )


def check_finite(producer: nn.Module) -> None:
    """Raise `DivergedError` when the last step has left what is no number (promise 8)."""
    broken = next((n for n, p in producer.named_parameters() if not p.isfinite().all()), None)
    if broken is not None:
        raise DivergedError(f"'{broken}' is not finite at the end; lower the learning rate")


class Movement:
    """Sees that every trained tensor gets a gradient and moves (promise 8).

    A gradient too: weight decay alone also moves a tensor, but teaches it nothing.

    Args:
        producer: as it is initialised.
    """

    def __init__(self, producer: nn.Module) -> None:
        self._producer = producer
        self._initial = {name: p.detach().clone() for name, p in producer.named_parameters()}
        self._felt: set[str] = set()
        self._steps = 0

    def resumed(self, steps: int) -> None:
        """Go on after so many steps; what was seen then is not looked at again.

        The late steps of a run may move nothing any more.
        """
        self._steps = steps
        if steps >= MOVED_BY:
            self._initial = {}

    def feel(self) -> None:
        """Note which tensors have a gradient; before a step."""
        if self._initial and self._steps < MOVED_BY:
            named = self._producer.named_parameters()
            self._felt |= {n for n, p in named if p.grad is not None and p.grad.any()}

    def check(self) -> None:
        """Count a step; raise `DivergedError` where a tensor is what it was at the start."""
        self._steps += 1
        if not self._initial or self._steps != MOVED_BY:
            return
        still = [
            name
            for name, p in self._producer.named_parameters()
            if name not in self._felt or torch.equal(p, self._initial[name])
        ]
        if still:
            raise DivergedError(
                f"after {MOVED_BY} steps these trained tensors have not moved: {', '.join(still)}; "
                "they get no gradient, or their learning rate is too small for their precision"
            )
        self._initial = {}
