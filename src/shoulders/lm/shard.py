"""An LM whose layers are spread over processes: each holds its share of every layer's bytes.

torch's `fully_shard` (FSDP2) gathers a layer when it is run, forwards and again backwards, and lets
it go. Only decoder layers are sharded: embedding, final norm and head are driven one by one (see
`shoulders.lm.frozen`), are often tied, and stay whole everywhere. Nothing is trained in here, so
that gathering is all that processes exchange.

Every pass of one process needs all others: they must run as many, and of the same kind. So each
says what it is about to do, and who has no work left runs empty passes until all are through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shoulders.errors import LMError

START = (
    "start it with `torchrun --nproc-per-node N -m shoulders train ...` or `accelerate launch "
    "--multi_gpu --num_processes N -m shoulders train ...` (on CPUs too: --cpu starts only one)"
)
SHARDED_AS = ("auto", "float32", "bfloat16")

# What a process is about to do with the LM.
_NOTHING, _FORWARD, _BOTH_WAYS = 0, 1, 2


class Shards:
    """The sharded layers of one LM, and the agreement about its passes.

    NCCL carries the layers between GPUs (untested: written on a machine without), gloo between
    processes on CPUs. What processes tell one another are a few bytes through gloo in both cases.
    """

    def __init__(self, model: Any, layers: nn.ModuleList, count: int) -> None:
        self._model, self._layers = model, layers
        self.count = count

    @classmethod
    def of(cls, model: Any, device: torch.device) -> Shards:
        """Shard a frozen model's decoder layers, in place, over all processes that were started.

        Layers go to `device` one at a time, so that it never holds them all; the rest of the model
        is left where it is. Raises `LMError` where that cannot be done.
        """
        check_shardable("auto")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        body, count = model.base_model, torch.distributed.get_world_size()
        layers = decoder_layers(model)
        plain = (type(p.data) is Tensor and p.is_floating_point() for p in layers.parameters())
        if not all(plain):
            raise LMError(f"{type(model).__name__}: its weights are quantised; load them plain")
        mesh = init_device_mesh(device.type, (count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        # The body comes last as the root, which lets a layer's gathering overlap with the one
        # before; of its own it shards nothing.
        inside = {id(p) for p in layers.parameters()}
        outside = {p for p in model.parameters() if id(p) not in inside}
        fully_shard(body, mesh=mesh, reshard_after_forward=True, ignored_params=outside)
        return cls(model, layers, count)

    @property
    def held(self) -> int:
        """Number of the layers' parameters that this process holds between passes."""
        return sum(held(p).numel() for p in self._layers.parameters())

    @property
    def parameters(self) -> int:
        """Number of the layers' parameters in all processes together."""
        return sum(p.numel() for p in self._layers.parameters())

    def announce(self) -> None:
        """Wait until every process is about to run a pass or has no work left.

        Where gradients are enabled, a backward pass has to follow before the next one. Raises
        `RuntimeError`, in all processes, where passes are of different kinds.
        """
        self._agree(_BOTH_WAYS if torch.is_grad_enabled() else _FORWARD)

    def settle(self) -> None:
        """Run empty passes beside other processes' work; return when none has any left."""
        embedding = self._model.get_input_embeddings()
        token = torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)
        while kind := self._agree(_NOTHING):
            with torch.set_grad_enabled(kind == _BOTH_WAYS):
                x = embedding(token).detach().requires_grad_(kind == _BOTH_WAYS)
                output = self._model.base_model(inputs_embeds=x, use_cache=False)
                if kind == _BOTH_WAYS:
                    torch.autograd.grad(output.last_hidden_state.sum(), x)

    def _agree(self, mine: int) -> int:
        """Exchange what each process is about to do; return what those with work are."""
        own = torch.tensor([mine])
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        torch.distributed.all_gather(everyone, own)
        kinds = {int(kind) for kind in everyone} - {_NOTHING}
        if len(kinds) > 1:
            raise RuntimeError(
                "processes that share a sharded LM are out of step: some run a pass with "
                "gradients, others one without"
            )
        return max(kinds, default=_NOTHING)


def check_shardable(dtype: str) -> None:
    """Raise `LMError`, saying what to do, where layers cannot be sharded."""
    if dtype not in SHARDED_AS:
        raise LMError(f"dtype {dtype}: cannot be sharded; use one of {', '.join(SHARDED_AS)}")
    try:
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError:
        raise LMError(
            f"sharding the LM needs torch 2.6 with distributed (this is {torch.__version__})"
        ) from None
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() < 2:
        raise LMError(f"sharding the LM needs several processes: {START}")


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's decoder layers; raises `LMError` where there is none."""
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise LMError(f"{type(model).__name__}: has no list of {wanted} decoder layers to shard")


def held(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it unless it is sharded."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered from all processes (which must all ask) if sharded."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
