"""Fixtures: tiny random LMs and encoders of several architectures, and the embedded LM."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from shoulders.encoders.frozen import FrozenEncoder
    from shoulders.lm.frozen import FrozenLM
    from shoulders.lm.kernels import Kernels

ARCHITECTURES = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2")
# Window of every tiny LM, and how far Gemma-2's first layer looks back.
TINY_WINDOW = 64
TINY_SLIDING_WINDOW = 14

_USER_CACHE = os.environ.get("SHOULDERS_CACHE")
_CORPUS = (
    "The capital of France is Paris, and the capital of Norway is Oslo.",
    "Is this review positive or negative? It was a wonderful film.",
    "one two three four five six seven eight nine ten 0 1 2 3 4 5 6 7 8 9",
    "Question: who wrote the book? Answer: nobody knows yet.",
)


def pytest_configure() -> None:
    """Let nothing hang on the machine: what runs beside, a GPU in it, a proxy around it."""
    from hypothesis import settings

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = "127.0.0.1,localhost"

    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


@functools.cache
def _tokenizer(ends: bool = False) -> Any:
    """Train a byte-level BPE of 320 entries: every byte, some merges, two special tokens.

    With `ends`, as encoders have it, every text gets the end token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS, trainer)
    if ends:
        backend.post_processor = processors.TemplateProcessing(
            single="$A <eos>", special_tokens=[("<eos>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def _tiny_config(arch: str, vocabulary: int) -> Any:
    from transformers import (
        Gemma2Config,
        GemmaConfig,
        GPT2Config,
        LlamaConfig,
        MistralConfig,
        Qwen2Config,
        Qwen3Config,
    )

    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    if arch == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary,
            n_positions=TINY_WINDOW,
            n_embd=32,
            n_layer=3,
            n_head=4,
            **special,
        )
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": TINY_WINDOW,
        **special,
    }
    if arch == "llama":
        return LlamaConfig(**common)
    if arch == "llama64":  # sizes that fit the tiles of a processor's matrix unit
        return LlamaConfig(**common | {"hidden_size": 64, "intermediate_size": 128})
    if arch == "mistral":  # Llama's layers with a sliding window
        return MistralConfig(**common, sliding_window=TINY_SLIDING_WINDOW)
    if arch == "qwen2":
        return Qwen2Config(**common)
    if arch == "qwen3":
        return Qwen3Config(**common, head_dim=16)
    if arch == "gemma":
        return GemmaConfig(**common, head_dim=16)
    if arch == "gemma2":
        # Layers alternate between sliding and full attention.
        return Gemma2Config(
            **common,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=TINY_SLIDING_WINDOW,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    raise ValueError(arch)


def _randomise(model: Any, seed: int) -> None:
    """Draw weights of a size at which attention, biases and norms all matter to the logits."""
    import torch

    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=random)
            if parameter.dim() == 1:
                # Norm weights around their neutral value (0 in Gemma), biases around 0.
                parameter.add_(0.3 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            else:
                parameter.copy_(noise * 1.5 * parameter.shape[1] ** -0.5)


def make_tiny_lm(arch: str, seed: int = 0, dtype: str = "float32") -> FrozenLM:
    """Build a random LM of one of `ARCHITECTURES`, the same for the same seed."""
    import torch
    from transformers import AutoModelForCausalLM

    from shoulders.lm.frozen import FrozenLM

    tokenizer = _tokenizer()
    config = _tiny_config(arch, len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomise(model, seed)
    return FrozenLM(model.to(getattr(torch, dtype)), tokenizer, f"tiny-{arch}")


def save_lm(lm: FrozenLM, folder: Path) -> Path:
    """Write an LM as `load_lm` reads it."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm() -> Callable[[str], FrozenLM]:
    """Return the tiny LM of an architecture; do not change what it returns."""
    return functools.cache(make_tiny_lm)


@pytest.fixture(scope="session")
def fresh_lm() -> Callable[..., FrozenLM]:
    """Make a tiny LM (`arch, seed, dtype`) that a test may change."""
    return make_tiny_lm


@pytest.fixture(scope="session")
def embedded_lm() -> FrozenLM:
    """Return the embedded LM in float32; for tests marked `slow`, not to be changed."""
    from shoulders.lm.gguf import EMBEDDED_PACKAGE
    from shoulders.lm.load import load_lm

    _skip_without(EMBEDDED_PACKAGE[0])
    # The user's own cache, whatever a test has set: converting the GGUF file takes long.
    with pytest.MonkeyPatch.context() as patch:
        if _USER_CACHE is None:
            patch.delenv("SHOULDERS_CACHE", raising=False)
        else:
            patch.setenv("SHOULDERS_CACHE", _USER_CACHE)
        return load_lm("embedded", dtype="float32")


@pytest.fixture(
    scope="session", params=[*ARCHITECTURES, pytest.param("embedded", marks=pytest.mark.slow)]
)
def lm(request: pytest.FixtureRequest, tiny_lm: Callable[[str], FrozenLM]) -> FrozenLM:
    """Every architecture in turn; the embedded LM when slow tests run."""
    if request.param == "embedded":
        embedded: FrozenLM = request.getfixturevalue("embedded_lm")
        return embedded
    return tiny_lm(request.param)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random BERT of 40 positions."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=1,
    )
    return _save_encoder(BertModel(config), tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random T5, encoder and decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(_tokenizer()),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=1,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    return _save_encoder(T5ForConditionalGeneration(config), tmp_path_factory.mktemp("t5"))


def _save_encoder(model: Any, folder: Path) -> Path:
    _randomise(model, seed=1)
    model.save_pretrained(folder)
    _tokenizer(ends=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(bert_folder: Path) -> FrozenEncoder:
    """Return the tiny BERT, frozen."""
    from shoulders.encoders.load import load_encoder

    return load_encoder(str(bert_folder))


@pytest.fixture(scope="session")
def tiny_t5(t5_folder: Path) -> FrozenEncoder:
    """Return the encoder half of the tiny T5, frozen."""
    from shoulders.encoders.load import load_encoder

    return load_encoder(str(t5_folder))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point `$SHOULDERS_CACHE` at an empty folder for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SHOULDERS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def avx2_kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    """Return our compiled functions as a processor has them whose best is AVX2."""
    from shoulders.lm import kernels

    if not {"avx2", "fma"} <= {*kernels._processor_flags().split()}:
        pytest.skip("this processor has no AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, "-march=haswell"))
        patch.setenv("SHOULDERS_CACHE", str(tmp_path_factory.mktemp("avx2")))
        found = kernels.available.__wrapped__()
    assert found is not None, "CI has a C compiler"
    assert found.pairs is not None
    assert found.tiles is None
    return found


@pytest.fixture
def avx2_alone(avx2_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Compute as a processor does whose best is AVX2."""
    for module in ("fused", "head", "int8", "sampling"):
        monkeypatch.setattr(f"shoulders.lm.{module}.available", lambda: avx2_kernels)
    monkeypatch.setattr("shoulders.lm.fused.fast_bfloat16", lambda _: False)
    monkeypatch.setattr("shoulders.lm.fused.has", lambda _: False)
    monkeypatch.setattr("shoulders.lm.block.has_int8", lambda: False)
    return avx2_kernels


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of shared data sets, or skip."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    for name in ("nq/passages.tsv", "nq/validation.jsonl"):
        if not (folder / name).is_file():
            pytest.skip(f"no shared data: {folder / name}")
    return folder


def _skip_without(package: str) -> None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
