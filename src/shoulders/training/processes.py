"""Training in several processes: each computes some packs of every step, all take the same step.

Started by `accelerate launch` or `torchrun`; `accelerate` finds the processes and picks the backend
(gloo on CPUs, NCCL on GPUs). Gradients of the small trained network are exchanged once a step, and
summed in the order of the processes, so that all hold the same bits. Nothing else is, unless the
LM is sharded (`shoulders.lm.shard`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shoulders.errors import TrainingError, install

T = TypeVar("T")


class Processes:
    """This process's place among `count`; the default is one process alone."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @classmethod
    def started(cls) -> Processes:
        """Join the processes that a launcher has started, if it has started several.

        Raises `TrainingError` where `accelerate` is needed and not installed, or set to do what
        is done here.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError:
            raise TrainingError(f"several processes need accelerate: {install('train')}") from None
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            # It also makes transformers load weights in the first process only.
            raise TrainingError("leave out --use_fsdp; training.shard_lm: true shards the LM")
        gpus = torch.cuda.is_available()
        # Layers of a sharded LM travel between GPUs, everything else is small and on CPUs.
        state = PartialState(cpu=not gpus, backend="cpu:gloo,cuda:nccl" if gpus else None)
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def agree(self, what: str, value: Any) -> None:
        """Raise `TrainingError`, in all processes, unless `value` (as JSON) is the same in all."""
        if self.count == 1:
            return
        # Its hash: equality is all that is asked, and no process reads another's pickles.
        text = json.dumps(value, sort_keys=True, default=str)
        mine = torch.tensor([*hashlib.sha256(text.encode()).digest()], dtype=torch.uint8)
        values = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(values, mine)
        for rank, other in enumerate(values):
            if not torch.equal(other, values[0]):
                raise TrainingError(f"{what}: not the same in processes 0 and {rank}")

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that are this process's to do."""
        return items[self.rank :: self.count]

    def summed(
        self, trained: Sequence[nn.Parameter], loss: float, stop: bool
    ) -> tuple[float, bool]:
        """Sum every process's gradients, in place; return the summed loss and whether any stops."""
        if self.count == 1:
            return loss, stop
        pieces: list[Tensor] = [torch.tensor([loss, float(stop)], dtype=torch.float64)]
        for parameter in trained:
            gradient = parameter.grad
            have = torch.tensor([float(gradient is not None)], dtype=torch.float64)
            value = torch.zeros_like(parameter) if gradient is None else gradient
            pieces += [have, value.detach().flatten().double().cpu()]
        mine = torch.cat(pieces)
        others = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(others, mine)
        total = others[0]
        for other in others[1:]:
            total = total + other
        at = 2
        for parameter in trained:
            size = parameter.numel()
            found = bool(total[at] > 0)
            value = total[at + 1 : at + 1 + size].view_as(parameter).to(parameter)
            parameter.grad = value if found else None
            at += 1 + size
        return float(total[0]), bool(total[1] > 0)
