"""LMs in 8 and 4 bits: against what their integers stand for, and the promises through them.

Each is compared with a plain LM whose weights are written out here from integers and scales. Both
compute in float32; largest differences may be 1e-5 of the largest number (measured: 1e-6).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import save_lm
from shoulders.cli.app import main
from shoulders.cli.common import open_skill
from shoulders.cli.options import LMChoice
from shoulders.errors import LMError, RecipeError
from shoulders.lm import quantized
from shoulders.lm.combine import combine
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.lent import LentLinear, held_tensors
from shoulders.lm.load import load_lm
from shoulders.lm.processor import fast_bfloat16
from shoulders.lm.prompt import Prompt
from shoulders.skills.artefact import read_artefact
from shoulders.training.objective import Example, answer_losses
from shoulders.training.recipe import make_recipe
from shoulders.training.run import run_recipe
from tiny_models import recipe_values, save_tiny_lm, write_jsonl

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6]]
TOLERANCE = 1e-5
NEEDS = {"int8": "torchao", "nf4": "bitsandbytes"}
# How an LM comes to be quantised: rounded by `load_lm`, or stored so in its folder.
ROUNDED = ["int8", "nf4"]
STORED = ["torchao", "bitsandbytes-8", "bitsandbytes-4"]
Load = Callable[..., FrozenLM]


@pytest.fixture
def load(fresh_lm: Callable[..., FrozenLM], tmp_path: Path) -> Load:
    """Load a tiny LM quantised in one of the ways, or plain."""

    def one(way: str | None, arch: str = "llama") -> FrozenLM:
        folder = tmp_path / arch
        if not folder.exists():
            save_lm(fresh_lm(arch), folder)
        needed = NEEDS.get(way or "", (way or "").partition("-")[0])
        if needed and find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
        if way not in STORED:
            return load_lm(str(folder), dtype="float32", quantize=way)  # type: ignore[arg-type]
        if not (folder / way).exists():
            store(folder, way)
        return load_lm(str(folder / way), dtype="float32")

    return one


def store(folder: Path, way: str) -> None:
    """Write the LM in `folder` to `folder / way` as users of transformers do."""
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TorchAoConfig,
    )

    if way == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config: Any = TorchAoConfig(Int8WeightOnlyConfig())
    elif way == "bitsandbytes-8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(folder / way)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / way)


def written_out(weight: Any) -> Tensor:
    """Return what a quantised weight stands for, from its integers and scales, `[n, k]`."""
    if hasattr(weight, "qdata"):
        return weight.qdata.float() * weight.scale.view(-1, 1)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.data.float() * weight.SCB[:, None] / 127
    scale = state.absmax
    if state.nested:
        blocks = torch.arange(len(scale)) // state.state2.blocksize
        scale = state.state2.code[scale.long()] * state.state2.absmax[blocks] + state.offset
    packed = weight.data.flatten().long()
    levels = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten()]
    spread = scale.repeat_interleave(state.blocksize)[: len(levels)]
    return (levels * spread).view(state.shape)


def plain_twin(lm: FrozenLM, plain: FrozenLM) -> FrozenLM:
    """Return an LM of plain float weights that stand for the same numbers."""
    quantised = [(n, m) for n, m in lm.model.named_modules() if isinstance(m, LentLinear)]
    assert len(quantised) >= 4 * 3, "linear layers of a tiny LM"
    model = plain.model
    for name, module in quantised:
        linear = model.get_submodule(name)
        weight = written_out(module.weight)
        with torch.no_grad():
            linear.weight.copy_(weight if isinstance(linear, nn.Linear) else weight.T)
    return FrozenLM(model, lm.tokenizer, "twin")


def prompt_for(lm: FrozenLM, seed: int = 0) -> Prompt:
    """Return random vectors and prefixes, leaves that take gradients."""
    random, shape, rows = torch.Generator().manual_seed(seed), lm.prefix_shape, len(ROWS)
    size = rows, shape.layers, 2, shape.kv_heads, 3, shape.head_dim
    return Prompt(
        (0.2 * torch.randn(rows, 2, lm.hidden_size, generator=random)).requires_grad_(),
        torch.ones(rows, 2, dtype=torch.bool),
        torch.randn(size, generator=random).requires_grad_(),
        torch.ones(rows, 3, dtype=torch.bool),
    )


def gradients(lm: FrozenLM) -> list[Tensor]:
    """Return losses `[tokens]` and their sum's gradients of vectors and of keys/values."""
    prompt = prompt_for(lm)
    examples = [Example(str(ids), ids, [20 + i, 21, 0], "t") for i, ids in enumerate(ROWS)]
    losses = answer_losses(lm, prompt, examples)
    return [
        losses.detach(),
        *torch.autograd.grad(losses.sum(), [prompt.vectors, prompt.keys_values]),
    ]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("way", [*ROUNDED, *STORED])
def test_gradients_are_those_of_the_dequantised_lm(way: str, arch: str, load: Load) -> None:
    lm = load(way, arch)
    assert lm.blocks is None
    twin = plain_twin(lm, load(None, arch))
    found, expected = gradients(lm), gradients(twin)
    for mine, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        assert float((mine - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_gpt2_quantises_with_bitsandbytes_and_says_so_without(load: Load) -> None:
    """Its layers are no `nn.Linear`: torchao would leave them all as they are."""
    with pytest.raises(LMError, match="no linear layer to quantise; try nf4"):
        load("int8", "gpt2")
    lm = load("nf4", "gpt2")
    twin = plain_twin(lm, load(None, "gpt2"))
    for mine, theirs in zip(gradients(lm), gradients(twin), strict=True):
        assert float((mine - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("way", [*ROUNDED, *STORED])
def test_autograd_keeps_no_plain_matrix(way: str, load: Load) -> None:
    lm, plain = load(way), load(None)
    matrices = {p.shape for n, p in plain.model.named_parameters() if "proj" in n}
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        gradients(lm)
    assert kept
    assert not [t.shape for t in kept if {t.shape, t.shape[::-1]} & matrices]


@pytest.mark.parametrize("way", [*ROUNDED, *STORED])
def test_every_byte_is_the_same_after_training_and_generation(way: str, load: Load) -> None:
    lm = load(way)
    before = lm.digest()
    gradients(lm)
    generate(lm, prompt_for(lm), ROWS, DecodingConfig(max_new_tokens=4))
    assert lm.digest() == before
    assert load(way).digest() == before
    assert lm.parameters == load(None).parameters


@pytest.mark.parametrize("way", [*ROUNDED, *STORED])
def test_digest_sees_integers_and_scales(way: str, load: Load) -> None:
    lm = load(way)
    before = lm.digest()
    weight: Any = lm.model.model.layers[1].mlp.up_proj.weight
    integers = weight.qdata if hasattr(weight, "qdata") else weight.data
    state = getattr(weight, "quant_state", None)
    scales = weight.scale if hasattr(weight, "qdata") else state.absmax if state else weight.SCB
    for tensor in (integers, scales):
        raw = tensor.view(torch.uint8).view(-1)
        raw[-1] ^= 1
        assert lm.digest() != before
        raw[-1] ^= 1
        assert lm.digest() == before


@pytest.mark.parametrize("way", [*ROUNDED, *STORED])
def test_fingerprint_is_of_the_lm_that_the_folder_holds(way: str, load: Load) -> None:
    lm, plain = load(way), load(None)
    assert lm.digest() != plain.digest()
    assert (lm.fingerprint == plain.fingerprint) == (way in ROUNDED)
    assert load(way).fingerprint == lm.fingerprint
    assert (lm.quantize, plain.quantize) == (way if way in ROUNDED else None, None)


@pytest.mark.parametrize("way", ROUNDED)
def test_cached_answers_equal_a_loop_without_a_cache(way: str, load: Load) -> None:
    lm = load(way)
    prompt = prompt_for(lm)
    with torch.no_grad():
        answers = generate(lm, prompt, ROWS, DecodingConfig(max_new_tokens=6))
        for i, (answer,) in enumerate(answers):
            ids = list(ROWS[i])
            for token in answer.token_ids:
                batch = combine(lm, prompt.select([i]), [ids])
                hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
                assert int(lm.logits(hidden[0, -1:]).argmax()) == token
                ids.append(token)


@pytest.mark.parametrize("way", ROUNDED)
def test_bfloat16_computes_in_it(way: str, load: Load, tmp_path: Path) -> None:
    load(way)
    lm = load_lm(str(tmp_path / "llama"), dtype="bfloat16", quantize=way)  # type: ignore[arg-type]
    assert lm.dtype == torch.bfloat16
    assert all(torch.isfinite(tensor).all() for tensor in gradients(lm))


@pytest.mark.parametrize("way", ["torchao", "bitsandbytes-4"])
def test_a_model_of_transformers_that_is_quantised_is_not_laid_out(
    way: str, load: Load, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    if way == "bitsandbytes-4" and fast_bfloat16("cpu"):
        pytest.skip("bitsandbytes' own layers pack their weights here, and fail on so small ones")
    lm = load(way)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / way, dtype=torch.float32)
    assert FrozenLM(model, lm.tokenizer, "as it is").blocks is None


# -- skills ------------------------------------------------------------------------------


def test_a_skill_runs_on_the_quantised_lm_that_it_was_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")

    def command(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["shoulders", *arguments])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    values = recipe_values(save_tiny_lm(tmp_path / "lm"), tmp_path / "data", steps=3)
    values["lm"]["quantize"] = "int8"
    out = tmp_path / "skill"
    skill = run_recipe(make_recipe(values), out)
    assert skill.lm.quantize == "int8"
    assert read_artefact(out).lm_quantize == "int8"
    again, _ = open_skill(str(out), LMChoice())
    assert again.lm.digest() == skill.lm.digest()
    assert open_skill(str(out), LMChoice(quantize="none"))[0].lm.quantize is None
    data = write_jsonl(tmp_path / "d.jsonl", [{"task": "t", "input": "a", "targets": ["b"]}])
    scores = tmp_path / "scores.json"
    arguments = ["eval", str(out), "--data", str(data), "--json", str(scores)]
    assert command([*arguments, "--max-new-tokens", "2"]) == 0
    assert '"quantize": "int8"' in scores.read_text(encoding="utf-8")
    capsys.readouterr()
    assert command(["serve", "--skills", str(out), "--port", "0"]) == 2
    assert "held in int8, and the local engine serves plain LMs: --quantize" in " ".join(
        capsys.readouterr().err.split()
    )
    assert command([*arguments, "--quantize", "int3"]) == 2
    assert "--quantize int3: use one of int8, nf4, none" in capsys.readouterr().err


def test_int8_of_our_own_is_the_cpus_where_a_gpu_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that recipes with it run there; what asks for the GPU is told that it cannot be had."""
    folder = save_tiny_lm(tmp_path / "lm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_lm(str(folder), dtype="int8").device.type == "cpu"
    with pytest.raises(LMError, match="dtype int8 is for CPUs, the device is meta"):
        load_lm(str(folder), dtype="int8", device="meta")


# -- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int4"}, "quantize 'int4': use int8, or nf4 for 4 bits"),
        ({"quantize": "int8", "dtype": "int8"}, "dtype int8 rounds .* leave out quantize"),
        ({"device_map": "auto", "dtype": "int8"}, "dtype int8 .* leave out device_map"),
        ({"device_map": "sequential"}, "device_map 'sequential': use auto"),
        ({"device_map": "auto", "device": "cpu"}, "leave out device"),
    ],
)
def test_options_that_cannot_be_are_named(options: Any, message: str, load: Load) -> None:
    with pytest.raises(LMError, match=message):
        load_lm("embedded", **options)


@pytest.mark.parametrize("quantize", ROUNDED)
def test_a_missing_library_is_named(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: None)
    with pytest.raises(LMError, match=rf"needs {NEEDS[quantize]} .* pip install -e '\.\["):
        load_lm("embedded", quantize=quantize)
    with pytest.raises(LMError, match="device_map needs accelerate; run: pip install"):
        load_lm("embedded", device_map="auto")


@pytest.mark.parametrize("quantize", ROUNDED)
def test_a_library_that_fails_here_is_named(quantize: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel\nfor this platform")

    monkeypatch.setattr("transformers.TorchAoConfig", fail)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", fail)
    with pytest.raises(LMError, match="does not work on this machine: no kernel for this platform"):
        load_lm("embedded", quantize=quantize)


@pytest.mark.parametrize("way", STORED)
def test_a_folder_that_is_quantised_is_not_rounded_again(
    way: str, load: Load, tmp_path: Path
) -> None:
    load(way)
    folder = str(tmp_path / "llama" / way)
    with pytest.raises(LMError, match="stored in quantised form already: leave out quantize"):
        load_lm(folder, dtype="float32", quantize="int8")
    with pytest.raises(LMError, match="stored in quantised form already: choose another dtype"):
        load_lm(folder, dtype="int8")


def test_a_recipe_refuses_an_unknown_form(tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "lm", tmp_path / "data")
    values["lm"]["quantize"] = "int2"
    with pytest.raises(RecipeError, match=r"key 'lm\.quantize': Input should be 'int8' or 'nf4'"):
        make_recipe(values)


# -- the embedded LM ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ROUNDED)
def test_the_embedded_lm_trains_quantised(quantize: Any, embedded_lm: FrozenLM) -> None:
    pytest.importorskip(NEEDS[quantize])
    lm = load_lm("embedded", dtype="float32", quantize=quantize)
    assert lm.fingerprint == embedded_lm.fingerprint
    held = sum(t.nbytes for n, _, t in held_tensors(lm.model) if "layers" in n and "norm" not in n)
    assert held > 0
    before = lm.digest()
    text = [("The opposite of hot is", " cold"), ("The opposite of big is", " small")]
    examples = [
        Example(x, lm.tokenize([x])[0], [*lm.tokenize([y])[0], lm.end_ids[0]], "t") for x, y in text
    ]
    start = lm.embed(torch.tensor(lm.tokenize(["Answer with one word please."])[0])).detach()
    vectors = start.clone().requires_grad_()
    optimizer, losses = torch.optim.AdamW([vectors], lr=0.01), []
    for _ in range(6):
        prompt = Prompt.of_vectors(vectors.expand(len(examples), -1, -1))
        loss = answer_losses(lm, prompt, examples).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert lm.digest() == before
