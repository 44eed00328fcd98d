"""A KV connector for vLLM: loads a skill's keys/values behind placeholder tokens.

Runs inside vLLM's own processes and environment, which it is named to at their start:

    vllm serve LM --enable-prompt-embeds --kv-transfer-config '{"kv_connector": "PrefixConnector",
        "kv_role": "kv_consumer", "kv_connector_module_path": "shoulders.serving.prefix_connector"}'

A request brings its prefix with it (`shoulders.serving.embeds`), so that nothing is shared between
machines but the requests. Its first positions hold placeholder tokens, which are never computed:
the scheduler is told that they are there already, and the worker writes them through the attention
layer's own method for new keys/values, whatever layout its cache has. Keys carry their rotary
position, tokens count on from the prefix.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

PREFIX = (
    "shoulders_prefix"  # as in shoulders.serving.embeds, which is not imported here: torch only
)
LOG = init_logger("vllm.shoulders")


@dataclass
class Load:
    """Keys/values to be written for one request.

    Attributes:
        data: base64 of safetensors with `prefix`, `[layers, 2, heads, q, e]`.
        first: position from which on; earlier ones were in vLLM's prefix cache.
        length: `q`.
        blocks: of the request's cache, in order.
    """

    data: str
    first: int
    length: int
    blocks: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """What one step has to load."""

    loads: list[Load] = field(default_factory=list)


class PrefixConnector(KVConnectorBase_V1):
    """See the module; vLLM makes one in its scheduler and one in each worker."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        self._dtype: torch.dtype = vllm_config.model_config.dtype
        self._waiting: dict[str, Load] = {}
        self._failed: set[int] = set()

    # -- in the scheduler ----------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return how many positions of a request are to be loaded, before its next step."""
        _, length = _given(request)
        # One position at least is computed: the input has a token.
        length = min(length, request.num_tokens - 1)
        return max(0, length - num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Note where a request's positions are."""
        if num_external_tokens > 0:
            data, length = _given(request)
            own = list(blocks.get_block_ids()[0])
            load = Load(data, length - num_external_tokens, length, own)
            self._waiting[request.request_id] = load

    def build_connector_meta(self, _: SchedulerOutput) -> Loads:
        """Return what the coming step has to load."""
        found = Loads(list(self._waiting.values()))
        self._waiting.clear()
        return found

    # -- in a worker ---------------------------------------------------------------------

    def start_load_kv(self, forward_context: ForwardContext, **_: Any) -> None:
        """Write the keys/values of this step's new requests."""
        for one in self._get_connector_metadata().loads:
            try:
                self._write(one, forward_context.no_compile_layers)
            except Exception as error:  # vLLM then fails this request, not all of them
                LOG.error("a prefix could not be loaded: %s", error)
                self._failed |= set(one.blocks[: -(-one.length // self._block_size)])

    def _write(self, one: Load, layers: Mapping[str, Any]) -> None:
        prefix = load(base64.b64decode(one.data, validate=True))["prefix"].to(self._dtype)
        if prefix.dim() != 5 or prefix.shape[1] != 2 or prefix.shape[3] != one.length:
            raise ValueError(f"a prefix of shape {tuple(prefix.shape)}")
        positions = torch.arange(one.first, one.length)
        blocks = torch.tensor(one.blocks)[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        attention = {n: v for n, v in layers.items() if hasattr(v, "kv_cache")}
        if len(attention) > len(prefix):
            raise ValueError(f"a prefix of {len(prefix)} layers for {len(attention)}")
        for name, layer in attention.items():
            # [2, heads, q, e] -> [2, q, heads of this rank, e]
            own = prefix[extract_layer_index(name)][:, _heads(layer, prefix.shape[2])]
            keys, values = own[:, :, one.first :].transpose(1, 2).to(layer.kv_cache.device)
            layer.impl.do_kv_cache_update(
                layer,
                keys.contiguous(),
                values.contiguous(),
                layer.kv_cache,
                slots.to(layer.kv_cache.device),
            )

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return blocks that could not be loaded since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    # Nothing is saved, and nothing is loaded layer by layer.

    def wait_for_layer_load(self, *_: Any, **__: Any) -> None:  # noqa: D102
        return

    def save_kv_layer(self, *_: Any, **__: Any) -> None:  # noqa: D102
        return

    def wait_for_save(self) -> None:  # noqa: D102
        return


def _given(request: Request) -> tuple[str, int]:
    """Return the prefix that a request brings, and its length; 0 without one."""
    given = request.kv_transfer_params or {}
    data, length = given.get(PREFIX), given.get("length")
    if not isinstance(data, str) or not isinstance(length, int) or length < 1:
        return "", 0
    return data, length


def _heads(layer: Any, every: int) -> slice:
    """Return the key/value heads that this rank of tensor parallelism holds, of all."""
    own: int = layer.num_kv_heads
    ranks = get_tensor_model_parallel_world_size()
    if own != max(1, every // ranks):
        raise ValueError(f"a prefix of {every} heads for {own} on each of {ranks}")
    # Where there are more ranks than heads, neighbours hold the same one.
    first = get_tensor_model_parallel_rank() * every // ranks
    return slice(first, first + own)
