"""Which architectures run through our own layers: those that compute what these do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        ("llama", True),
        ("mistral", True),
        ("qwen2", True),
        ("smollm3", False),  # a fourth of its layers know no positions
        ("ernie4_5", False),  # positions turned pair by pair
        ("helium", False),
    ],
)
def test_layers_of_llamas_parts_are_fused_only_where_they_are_llamas(
    kind: str, fused: bool, tiny_lm: Callable[[str], FrozenLM]
) -> None:
    config = AutoConfig.for_model(
        kind, vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
        pad_token_id=0, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    lm = FrozenLM(model, tiny_lm("llama").tokenizer, kind)
    assert (lm.blocks is not None) == fused
    ids = torch.arange(20)[None] * 7 % 320
    with torch.no_grad():
        own = model.base_model(input_ids=ids).last_hidden_state[0]
        found = states(lm, Prompt.empty(1), lm.embed(ids[0]), [20])
    torch.testing.assert_close(found.values[found.starts[0] :], own, atol=1e-3, rtol=1e-3)
