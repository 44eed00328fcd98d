"""GGUF files: what is in them is read, or they are refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shoulders.errors import LMError
from shoulders.lm.gguf import converted
from shoulders.lm.load import load_lm
from tiny_models import tiny_tokenizer

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def written(path: Path, *, without: str | None = None, change: Any = None) -> LlamaForCausalLM:
    """Write a random Llama as llama.cpp does; `change` adds to the file, `without` leaves out."""
    torch.manual_seed(0)
    described = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(2)
    file.add_feed_forward_length(48)
    file.add_head_count(4)
    file.add_head_count_kv(4)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(8)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([1] * len(tokens))
    file.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in described["merges"]])
    file.add_eos_token_id(0)
    file.add_bos_token_id(0)
    for name, value in model.state_dict().items():
        inside = name.removeprefix("model.").removesuffix(".weight")
        _, _, of_layer = inside.partition("layers.")
        layer, _, part = of_layer.partition(".")
        own = f"blk.{layer}.{PARTS[part]}.weight" if layer else f"{PARTS[inside]}.weight"
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # a head's halves lie pair by pair
            value = value.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32)
        if without is None or without not in own:
            file.add_tensor(own, value.float().numpy())
    if change is not None:
        change(file)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return model


def scaled(file: Any) -> None:
    file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    file.add_rope_scaling_factor(4.0)


def test_it_is_the_lm_that_was_written(tmp_path: Path, own_cache: Path) -> None:
    model = written(tmp_path / "lm.gguf")
    lm = load_lm(str(tmp_path / "lm.gguf"), dtype="float32")
    ids = torch.tensor([[5, 9, 20, 33]])
    with torch.no_grad():
        found, wanted = (one(input_ids=ids).logits for one in (lm.model, model))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("without", "change", "said"),
    [
        ("blk.1.", None, "weights are not whole"),
        ("ffn_up", None, "weights are not whole"),
        (None, lambda f: f.add_uint16("split.count", 2), "a piece of a file that was split"),
        (None, scaled, "its positions are scaled \\(linear\\)"),
        (
            None,
            lambda f: f.add_tensor("rope_freqs.weight", np.full(4, 8, np.float32)),
            "frequencies of their own",
        ),
        (
            None,
            lambda f: f.add_tensor("blk.0.attn_q.bias", np.full(32, 5, np.float32)),
            "nothing of some of its biases",
        ),
    ],
)
def test_what_would_be_lost_is_refused(
    without: str | None, change: Any, said: str, tmp_path: Path, own_cache: Path
) -> None:
    written(tmp_path / "lm.gguf", without=without, change=change)
    with pytest.raises(LMError, match=said):
        converted(tmp_path / "lm.gguf")
    assert not list(own_cache.rglob("complete.json"))
