"""int8 layers: against what they stand for, and the promises through them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoulders.errors import ShouldersError
from shoulders.lm import block, fused, rounding
from shoulders.lm.block8 import Block8
from shoulders.lm.combine import combine
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.identity import lm_fingerprint
from shoulders.lm.int8 import Int8Linear, to_int8
from shoulders.lm.kernels import available
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.lm.smooth import smooth
from shoulders.training.objective import Example, answer_losses

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6]]


@pytest.fixture(params=["compiled", "avx2", "plain"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the compiled functions, this processor's and an older one's, and without them."""
    if request.param == "avx2":
        request.getfixturevalue("avx2_alone")
    if request.param == "plain":
        monkeypatch.setattr(fused, "available", lambda: None)
        monkeypatch.setattr("shoulders.lm.int8.available", lambda: None)
    return str(request.param)


def test_without_int8_instructions_the_product_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    left = torch.randint(-127, 128, (5, 900), dtype=torch.int8, generator=random)
    right = torch.randint(-127, 128, (900, 7), dtype=torch.int8, generator=random)
    exact = (left.long() @ right.long()).int()
    assert torch.equal(block.multiplied(left, right), exact)
    monkeypatch.setattr(block, "has_int8", lambda: False)
    assert torch.equal(block.multiplied(left, right), exact)


def int8_of(lm: FrozenLM) -> FrozenLM:
    """Round a fresh tiny LM, as `load_lm` does."""
    fingerprint = lm_fingerprint(lm.model, lm.tokenizer)
    if lm.blocks is not None:
        smooth(lm.model, lm.tokenizer)
    to_int8(lm.model)
    return FrozenLM(lm.model, lm.tokenizer, lm.name, fingerprint=fingerprint)


def prompt_for(lm: FrozenLM, rows: int, seed: int = 0) -> Prompt:
    """Return random vectors and prefixes, leaves that take gradients."""
    random, shape = torch.Generator().manual_seed(seed), lm.prefix_shape
    size = rows, shape.layers, 2, shape.kv_heads, 3, shape.head_dim
    return Prompt(
        (0.2 * torch.randn(rows, 2, lm.hidden_size, generator=random)).requires_grad_(),
        torch.ones(rows, 2, dtype=torch.bool),
        torch.randn(size, generator=random).requires_grad_(),
        torch.ones(rows, 3, dtype=torch.bool),
    )


def examples(rows: Sequence[list[int]] = ROWS) -> list[Example]:
    return [Example(str(ids), ids, [20 + i, 21, 0], "t") for i, ids in enumerate(rows)]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_the_dequantised_weight(bias: bool, kernels: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=bias)
    rounded = Int8Linear.of(linear)
    weight = rounded.dequantised()
    assert (
        float((weight - linear.weight).detach().abs().max())
        <= linear.weight.abs().max().item() / 250
    )
    x = torch.randn(3, 7, 96, requires_grad=True)
    y, g = rounded(x), torch.randn(3, 7, 80)
    expected = nn.functional.linear(x, weight, linear.bias)
    (gradient,) = torch.autograd.grad(y, x, g)
    (expected_gradient,) = torch.autograd.grad(expected, x, g)
    for mine, theirs in ((y, expected), (gradient, expected_gradient)):
        assert float((mine - theirs).detach().norm() / theirs.detach().norm()) < 0.01
    assert not any(p.requires_grad for p in rounded.parameters())


def test_smoothing_changes_no_logit_and_no_key_or_value(fresh_lm: Callable[..., FrozenLM]) -> None:
    """A prefix that was trained in int8 is asked in float32, and the other way round."""
    lm = fresh_lm("qwen2")  # with biases
    ids = torch.arange(2, 40)[None]
    cached = lm.model(ids, use_cache=True).past_key_values
    before = lm.model(ids).logits
    norms = lm.model.model.layers[0].input_layernorm.weight.clone()
    smooth(lm.model, lm.tokenizer)
    assert not torch.equal(norms, lm.model.model.layers[0].input_layernorm.weight)
    again = lm.model(ids, use_cache=True)
    pairs = [(again.logits, before)]
    for new, old in zip(again.past_key_values.layers, cached.layers, strict=True):
        pairs += [(new.keys, old.keys), (new.values, old.values)]
    for new, old in pairs:
        assert float((new - old).abs().max()) <= 1e-5 * float(old.abs().max())


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_lm_is_rounded_once(
    arch: str,
    dtype: torch.dtype,
    fresh_lm: Callable[..., FrozenLM],
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is kept is what was rounded, bit by bit; what is damaged is rounded again."""
    plain = fresh_lm(arch)
    plain.model.to(dtype).save_pretrained(tmp_path / "lm")
    plain.tokenizer.save_pretrained(tmp_path / "lm")
    ids = torch.arange(2, 40)[None]

    def logits() -> Tensor:
        lm = load_lm(str(tmp_path / "lm"), dtype="int8")
        assert all(p.dtype in (torch.int8, torch.float32) for p in lm.model.parameters())
        buffers.append(dict(lm.model.named_buffers(remove_duplicate=False)))
        return lm.model(ids).logits  # type: ignore[no-any-return]

    buffers: list[dict[str, Tensor]] = []
    first = logits()
    (file,) = own_cache.rglob("int8/*.safetensors")
    kept = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "to_int8", None)
        assert torch.equal(logits(), first)
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    for damaged in (kept[:-7], kept[:-1] + bytes([kept[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert torch.equal(logits(), first)
        assert file.read_bytes() == kept
    monkeypatch.setattr(rounding, "_keep", _full)
    file.unlink()
    assert torch.equal(logits(), first)


def _full(*_: object) -> None:
    raise ShouldersError("the disk is full")


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "gemma2"])
def test_a_rounded_lm_is_near_the_one_it_was(
    arch: str, fresh_lm: Callable[..., FrozenLM], kernels: str
) -> None:
    ids = torch.arange(2, 40)[None]
    lm = fresh_lm(arch)
    before, fingerprint = lm.model(ids).logits, lm.fingerprint
    parameters = lm.parameters
    rounded = int8_of(lm)
    assert rounded.precision == "int8"
    assert rounded.fingerprint == fingerprint, "a skill is bound to the LM, not to its precision"
    assert rounded.parameters == parameters
    after = rounded.model(ids).logits
    assert not torch.equal(before, after)
    assert float((after - before).norm() / before.norm()) < 0.1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rows_of_a_pack_are_bit_equal_to_rows_alone(
    arch: str, fresh_lm: Callable[..., FrozenLM], kernels: str
) -> None:
    lm = int8_of(fresh_lm(arch))
    prompt = prompt_for(lm, len(ROWS))
    assert lm.blocks is not None

    def states(rows: list[int]) -> list[Tensor]:
        assert lm.blocks is not None
        with torch.no_grad():
            own = [ROWS[i] for i in rows]
            counts = [len(r) for r in own]
            pack = lm.blocks.pack(prompt.select(rows), lm.embed_rows(own), counts)
            flat = lm.blocks.hidden(pack)
        return [flat[at : at + len(ROWS[i])] for at, i in zip(pack.first_token, rows, strict=True)]

    together = states([0, 1, 2, 3])
    for i, state in enumerate(together):
        (alone,) = states([i])
        if kernels != "plain":
            assert torch.equal(state, alone), "integer sums, and floats in each row's own order"
        else:
            assert float((state - alone).abs().max()) <= 1e-4


@pytest.mark.parametrize(("arch", "tolerance"), [("llama", 0.02), ("llama64", 0.1)])
def test_compiled_layers_are_near_the_plain_ones(
    fresh_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch, arch: str, tolerance: float
) -> None:
    """Where tiles fit, gates are kept in bfloat16: more levels fall to the other side."""
    monkeypatch.setattr("shoulders.lm.head.available", lambda: None)  # has a test of its own
    lm = int8_of(fresh_lm(arch))

    def run() -> list[Tensor]:
        prompt = prompt_for(lm, len(ROWS))
        losses = answer_losses(lm, prompt, examples())
        leaves = torch.autograd.grad(losses.sum(), [prompt.vectors, prompt.keys_values])
        return [losses.detach(), *leaves]

    compiled = run()
    monkeypatch.setattr(fused, "available", lambda: None)
    lm.blocks = fused.Blocks.of(lm.model)
    for mine, theirs in zip(compiled, run(), strict=True):
        # A level may fall to the other side where both sum in another order.
        assert float((mine - theirs).norm() / theirs.norm()) < tolerance


def test_layers_of_packed_weights_are_those_without(
    fresh_lm: Callable[..., FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of integers are exact; a level falls to the other side where they are added to."""
    compiled = available()
    if compiled is None or compiled.int8 is None:
        pytest.skip("on this processor torch multiplies int8")
    monkeypatch.setattr("shoulders.lm.head.available", lambda: None)
    whole = Block8._times
    monkeypatch.setattr(Block8, "_times", lambda *given, half=False, **more: whole(*given, **more))
    lm = int8_of(fresh_lm("llama64"))
    found = []
    for packs in (True, False):
        if not packs:
            monkeypatch.setattr(compiled, "tiles", None)
            monkeypatch.setattr(compiled, "pairs", None)
        prompt = prompt_for(lm, len(ROWS))
        losses = answer_losses(lm, prompt, examples())
        leaves = torch.autograd.grad(losses.sum(), [prompt.vectors, prompt.keys_values])
        found.append([losses.detach(), *leaves])
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_losses_of_a_packed_head_are_near_those_of_logits(
    fresh_lm: Callable[..., FrozenLM],
) -> None:
    lm = int8_of(fresh_lm("llama64"))
    states = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    targets = torch.arange(9) * 30
    plain = torch.nn.functional.cross_entropy(lm.logits(states), targets, reduction="none")
    found = lm.losses(states, targets)
    weights = torch.arange(1.0, 10.0)
    mine, theirs = (
        torch.autograd.grad((losses * weights).sum(), states)[0] for losses in (found, plain)
    )
    # What rounding the head's weights to bfloat16 changes.
    assert float((found - plain).abs().max()) < 0.02 * float(plain.abs().max())
    assert float((mine - theirs).norm() / theirs.norm()) < 0.02


def test_recomputed_gradients_are_bit_equal(
    fresh_lm: Callable[..., FrozenLM], kernels: str
) -> None:
    lm = int8_of(fresh_lm("llama"))
    found = []
    for recompute in (False, True):
        prompt = prompt_for(lm, len(ROWS))
        losses = answer_losses(lm, prompt, examples(), recompute=recompute)
        found.append(torch.autograd.grad(losses.sum(), [prompt.vectors, prompt.keys_values]))
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_nan_in_a_prompt_reaches_the_loss_of_its_row_only(
    fresh_lm: Callable[..., FrozenLM], kernels: str
) -> None:
    lm = int8_of(fresh_lm("llama"))
    prompt = prompt_for(lm, len(ROWS))
    with torch.no_grad():
        prompt.vectors[2, 0, 0] = float("nan")
        losses = answer_losses(lm, prompt, examples()).view(len(ROWS), 3)
    assert torch.isfinite(losses).all(1).tolist() == [True, True, False, True]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_cached_answers_equal_a_loop_without_a_cache(
    arch: str, fresh_lm: Callable[..., FrozenLM], kernels: str
) -> None:
    lm = int8_of(fresh_lm(arch))
    prompt = prompt_for(lm, len(ROWS))
    with torch.no_grad():
        answers = generate(lm, prompt, ROWS, DecodingConfig(max_new_tokens=8))
        for i, (answer,) in enumerate(answers):
            ids = list(ROWS[i])
            for token in answer.token_ids:
                batch = combine(lm, prompt.select([i]), [ids])
                hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
                assert int(lm.logits(hidden[0, -1:]).argmax()) == token
                ids.append(token)
