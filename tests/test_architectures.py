"""LMs of other architectures: right as transformers computes them alone, or refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BartConfig, BartForConditionalGeneration

from conftest import _randomise, _tokenizer, make_tiny_lm, save_lm
from shoulders.errors import LMError
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prefix_shape import prefix_shape
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states
from shoulders.prompts.lowrank import LowRank
from tiny_models import save_tiny_lm

ENDS = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    **ENDS,
}
BART = {
    "d_model": 32,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "max_position_embeddings": 64,
    **ENDS,
}
BLOOM = {**ENDS, "seq_length": 64}
HYBRID = {"layer_types": ["conv", "full_attention", "conv"]}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0}
ROWS = [[5, 9, 20, 33, 40, 41, 42, 43, 44], [7, 8], [100, 101, 102, 103, 104, 105], [30, 31, 32]]


def build(kind: str, **values: Any) -> FrozenLM:
    tokenizer = _tokenizer()
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, 0)
    return FrozenLM(model, tokenizer, f"tiny-{kind}")


@torch.no_grad()
def check_rows(lm: FrozenLM, vectors: int = 0) -> None:
    """Compare rows read together with the model's own logits of each row alone."""
    shared = torch.randn(vectors, lm.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.2
    prompt = Prompt.of_vectors(shared.expand(len(ROWS), -1, -1)) if vectors else None
    prompt = prompt or Prompt.empty(len(ROWS))
    counts = [len(row) for row in ROWS]
    found = states(lm, prompt, lm.embed_rows(ROWS), counts)
    for row, start in zip(ROWS, found.starts, strict=True):
        own = lm.logits(found.values[start : start + len(row)])
        read = torch.cat([shared, lm.embed(torch.tensor(row))])[None]
        alone = lm.model(inputs_embeds=read, use_cache=False).logits[0, vectors:]
        torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("gpt_neox", {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
        ("gemma3_text", {**LLAMA, "head_dim": 8, "sliding_window": 6}),
        ("granite", {**LLAMA, "residual_multiplier": 0.3, "embedding_multiplier": 3.0}),
        ("mixtral", {**LLAMA, "num_local_experts": 4}),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **ENDS}),
    ],
)
def test_rows_are_what_each_is_alone(kind: str, values: dict[str, Any]) -> None:
    lm = build(kind, **values)
    check_rows(lm)
    check_rows(lm, vectors=3)


def test_biases_by_place_are_read_row_by_row() -> None:
    """Falcon's ALiBi knows no positions of a row's own: it cannot be packed, and is right."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = build("falcon", alibi=True, **sizes, **ENDS)
    assert not lm.packs
    check_rows(lm)


def test_local_layers_end_the_window() -> None:
    """GPT-Neo's see so many places, pads and other rows' among them."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
    lm = build("gpt_neo", **sizes, window_size=16, attention_types=[[["global", "local"], 1]],
               **ENDS)  # fmt: skip
    assert (lm.max_positions, lm.packs) == (16, False)
    check_rows(lm)
    check_rows(lm, vectors=4)


def test_queries_that_grow_with_positions_are_left_to_transformers() -> None:
    scaled = {**YARN, "original_max_position_embeddings": 4, "llama_4_scaling_beta": 0.5}
    lm = build("ministral3", **LLAMA, head_dim=8, rope_parameters=scaled)
    assert lm.blocks is None
    check_rows(lm)


def test_longrope_is_read_up_to_its_original_window() -> None:
    """Beyond it, a batch's longest row decides how the others' keys are turned."""
    original = {"original_max_position_embeddings": 12}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    lm = build("phi3", **LLAMA, **original, rope_parameters={**LONG, **factors, **original})
    assert lm.max_positions == 12
    before = lm.digest()
    check_rows(lm)
    long = torch.arange(2, 14)[None]
    lm.hidden(lm.embed(long), torch.ones_like(long), torch.arange(12)[None])
    assert lm.digest() == before


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        ("lfm2", {**LLAMA, **HYBRID}, "keeps other states than keys and values"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, **ENDS}, "does not say how many"),
        ("bart", BART, "logits behind pads differ"),
    ],
)
def test_what_would_be_wrong_is_refused(kind: str, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(LMError, match=reason):
        build(kind, **values)


def test_what_raises_anything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("no attribute 'last_hidden_state'\nand more")

    monkeypatch.setattr(FrozenLM, "hidden", broken)
    with pytest.raises(LMError, match=r"not supported: no attribute 'last_hidden_state'$"):
        build("llama", **LLAMA)


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(_tokenizer()), **BART))
    model.save_pretrained(tmp_path)
    _tokenizer().save_pretrained(tmp_path)
    with pytest.raises(LMError, match="an encoder and a decoder"):
        load_lm(str(tmp_path))


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    """transformers would draw random ones, others in every process."""
    file = save_tiny_lm(tmp_path) / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(LMError, match=r"1 are missing, model.layers.1.mlp.down_proj.weight among"):
        load_lm(str(tmp_path))


def test_a_tokenizer_of_another_lm_is_refused(tmp_path: Path) -> None:
    lm = make_tiny_lm("llama")
    lm.model.resize_token_embeddings(200)
    save_lm(lm, tmp_path)
    with pytest.raises(LMError, match="its tokenizer has 320 tokens, the LM embeddings for 200"):
        load_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"device": "gpu"}, "device 'gpu': "),
        ({"device": "cuda:99"}, "device 'cuda:99': "),
        ({"max_memory": {"cpu": "1KB"}}, "give one"),
        ({"offload_folder": "x"}, "give one"),
        ({"revision": "main"}, "has no revisions"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(LMError, match=reason):
        load_lm(str(save_tiny_lm(tmp_path)), **options)


def test_an_lm_without_an_end_token_generates_on() -> None:
    lm = make_tiny_lm("llama")
    lm.end_ids = ()  # type: ignore[misc]
    decoding = DecodingConfig(max_new_tokens=3, min_new_tokens=2)
    ((found,),) = generate(lm, Prompt.empty(1), [[5, 6]], decoding)
    assert len(found.token_ids) == 3


def test_a_window_that_the_architecture_does_not_know_is_none() -> None:
    """As leftovers in configurations of LMs that were made Llamas."""
    lm = build("llama", **LLAMA, sliding_window=4)
    assert lm.model.config.sliding_window == 4
    assert lm.sliding_window is None
    check_rows(lm)
    assert build("mistral", **LLAMA, sliding_window=4).sliding_window == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beyond_a_sliding_window_rounding_would_depend_on_the_batch(dtype: str) -> None:
    """There the LM's own modules compute, and in bfloat16 round otherwise than our layers."""
    lm = make_tiny_lm("mistral", dtype=dtype)
    assert lm.blocks is not None
    assert lm.sliding_window is not None
    assert (lm.max_positions == lm.sliding_window) == (dtype == "bfloat16")


def test_an_lm_without_a_cache_is_refused() -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    with pytest.raises(LMError, match=r"tiny-openai-gpt .*not supported"):
        build("openai-gpt", **sizes)


def test_keys_and_values_behind_pads_are_refused_where_places_count() -> None:
    lm = build("mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **ENDS)
    with pytest.raises(LMError, match="pads between a key/value prefix and a row"):
        prefix_shape(lm)
    assert prefix_shape(build("bloom", hidden_size=32, n_layer=2, n_head=4, **BLOOM)).layers == 2


def test_states_wider_than_embeddings_take_no_updates() -> None:
    sizes = {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 16}
    lm = build("opt", **sizes)
    random = torch.Generator().manual_seed(0)
    with pytest.raises(LMError, match=r"32 wide, its embeddings 16: low-rank updates do not fit"):
        LowRank(2, lm).initialise(lm, torch.tensor([5, 6, 7]), random)


def test_weights_that_the_configuration_knows_nothing_of_are_refused(tmp_path: Path) -> None:
    folder = save_lm(make_tiny_lm("llama"), tmp_path / "lm")
    config = json.loads((folder / "config.json").read_text())
    layers = config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers - 1}))
    with pytest.raises(
        LMError, match=rf"nothing of \d+ of its weights, model\.layers\.{layers - 1}"
    ):
        load_lm(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file({**weights, **bias}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LMError, match=r"nothing of 1 of its weights, .*q_proj\.bias"):
        load_lm(str(folder))
    other = {"model.layers.0.mtp.weight": torch.ones(2)}  # of what is no part of a causal LM
    save_file({**weights, **other}, folder / "model.safetensors", metadata={"format": "pt"})
    load_lm(str(folder))
