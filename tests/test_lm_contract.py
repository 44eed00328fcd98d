"""Promises 3 and 4 on every architecture: rows are independent, cached equals uncached.

The reference throughout is one row alone: `cat([prompt, embed(tokens)])` through the whole
Hugging Face model, with no mask, no position ids and no padding, and for a prefix a plain
cache filled by hand. Full logits are compared, never means.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import DynamicCache

from shoulders.errors import WindowError
from shoulders.lm import states
from shoulders.lm.cache import Cache
from shoulders.lm.combine import combine
from shoulders.lm.decode import Completion, DecodingConfig, Delta, generate, stream
from shoulders.lm.factors import Factors
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.pack import Packed, can_pack, pack
from shoulders.lm.prompt import Prompt
from shoulders.lm.sampling import likeliest, next_tokens, sample_stream
from shoulders.lm.score import score
from shoulders.lm.shard import decoder_layers
from shoulders.lm.updates import Matrices
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.scoring import scored_ids
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example, answer_losses
from shoulders.training.running_text import RunningText

TOLERANCE = 1e-4
# Vectors and prefix positions of one row's prompt; nothing, one form, the other, both. A third
# number says whose low-rank updates it has: rows of the same share their matrices, and those of
# `INSIDE` and above are factors of the layers' products.
INSIDE = 3
FORMS = ((0, 0), (1, 0), (3, 0, 1), (5, 0, 3), (0, 1, 3), (0, 4, 1), (0, 6, 4), (2, 3, 2))


# -- the naive reference -----------------------------------------------------------------


@functools.cache
def make_matrices(lm: FrozenLM, number: int) -> Matrices | Factors:
    """Make random low-rank updates that change an LM's states by a tenth or so."""
    random = torch.Generator().manual_seed(number)
    if number >= INSIDE:
        thin, wide = [], []
        for site in lm.sites:
            shape = lm.layers, site.reads, number
            thin.append(torch.randn(shape, generator=random) / site.reads**0.5)
            shape = lm.layers, number, sum(site.writes)
            wide.append(0.1 * torch.randn(shape, generator=random))
        return Factors(lm.sites, tuple(thin), tuple(wide))
    d, rank = lm.hidden_size, 2 + number
    down = torch.randn(lm.layers, d, rank, generator=random) / d**0.5
    up = torch.randn(lm.layers, rank, d, generator=random)
    with torch.no_grad():
        unit = 0.1 * lm.embedding_scale * torch.rand(lm.layers, generator=random)
    return Matrices(down, up, unit)


def make_prompt(lm: FrozenLM, vectors: int, prefix: int, updates: int = 0, seed: int = 0) -> Prompt:
    """Make one row's random prompt, of the size of real embeddings and keys/values."""
    if updates:
        return make_prompt(lm, vectors, prefix, seed=seed).updated(make_matrices(lm, updates))
    random = torch.Generator().manual_seed(1000 * seed + 10 * vectors + prefix)
    d, s = lm.hidden_size, lm.prefix_shape
    x = torch.randn(1, vectors, d, generator=random) * lm.embedding_scale
    x = x.to(lm.dtype)
    kv = torch.zeros(1, s.layers, 2, s.kv_heads, prefix, s.head_dim, dtype=lm.dtype)
    if prefix:
        ids = torch.randint(2, 300, (1, prefix), generator=random)
        cache = DynamicCache()
        with torch.no_grad():
            lm.model(ids, past_key_values=cache, use_cache=True)
        kv = torch.stack([torch.stack([y.keys, y.values], 1) for y in cache.layers], 1)
        kv = kv + 0.1 * kv.std() * torch.randn(kv.shape, generator=random).to(lm.dtype)
    if not prefix:
        return Prompt.of_vectors(x)
    if not vectors:
        return Prompt.of_keys_values(kv)
    masks = torch.ones(1, vectors, dtype=torch.bool), torch.ones(1, prefix, dtype=torch.bool)
    return Prompt(x, masks[0], kv, masks[1])


def make_prompts(lm: FrozenLM, forms: Sequence[tuple[int, ...]], seed: int = 0) -> list[Prompt]:
    return [make_prompt(lm, *form, seed=seed + i) for i, form in enumerate(forms)]


def make_rows(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(2, 300, n).tolist() for n in lengths]


def naive_logits(lm: FrozenLM, prompt: Prompt, ids: Sequence[int]) -> Tensor:
    """Return logits `[p + tokens, vocabulary]` of one row alone, computed the plain way."""
    assert prompt.rows == 1
    embedded = lm.embed(torch.tensor([list(ids)]))
    if prompt.vectors.shape[1]:
        embedded = torch.cat([prompt.vectors, embedded], 1)
    cache = None
    if prompt.keys_values.shape[4]:
        cache = DynamicCache()
        for layer in range(prompt.keys_values.shape[1]):
            keys, values = prompt.keys_values[:, layer].unbind(1)
            cache.update(keys, values, layer)
    with updated_plainly(lm, prompt):
        output = lm.model(
            inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None
        )
    return output.logits[0].float()  # type: ignore[no-any-return]


@contextmanager
def updated_plainly(lm: FrozenLM, prompt: Prompt) -> Iterator[None]:
    """Let every layer end with the prompt's update, written out position by position."""
    handles = []
    if prompt.updates is not None:
        (own,) = prompt.updates.sets
        if isinstance(own, Factors):
            with multiplied_plainly(lm, own):
                yield
            return

        def change(number: int, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            new = states.clone()
            for place in range(states.shape[1]):
                x = states[0, place].double()
                normal = x / (x.square().mean() + 1e-6).sqrt()
                read = own.down[number].double().T @ normal
                update = own.up[number].double().T @ read * float(own.unit[number])
                new[0, place] = (x + update).to(states.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        for number, layer in enumerate(decoder_layers(lm.model)):
            handles.append(layer.register_forward_hook(lambda _, __, out, n=number: change(n, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def multiplied_plainly(lm: FrozenLM, own: Factors) -> Iterator[None]:
    """Let every linear layer end with its factors' product, written out position by position."""

    def change(x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
        new = output.clone()
        for place in range(x.shape[-2]):
            added = up.double().T @ (down.double().T @ x[0, place].double())
            new[0, place] = (output[0, place].double() + added).to(output.dtype)
        return new

    handles = []
    for number, layer in enumerate(decoder_layers(lm.model)):
        for index, site in enumerate(own.sites):
            start = 0
            for name, width in zip(site.names, site.writes, strict=True):
                down, up = own.down[index][number], own.up[index][number, :, start : start + width]
                start += width
                hook = lambda _, x, out, a=down, b=up: change(x[0], out, a, b)  # noqa: E731
                handles.append(layer.get_submodule(name).register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def naive_generate(
    lm: FrozenLM,
    prompt: Prompt,
    ids: Sequence[int],
    steps: int,
    choose: Callable[[Tensor], int] = lambda logits: int(logits.argmax()),
) -> list[int]:
    """Generate for one row, recomputing everything at each step."""
    new: list[int] = []
    while len(new) < steps and int(prompt.lengths()[0]) + len(ids) + len(new) <= lm.max_positions:
        new.append(choose(naive_logits(lm, prompt, [*ids, *new])[-1]))
        if new[-1] in lm.end_ids:
            break
    return new


def numpy_sampler(
    seed: int, ids: Sequence[int], sample: int, temperature: float, top_p: float
) -> Callable[[Tensor], int]:
    """Return a reference sampler: cut the tail, let what is kept race."""
    random = sample_stream(seed, ids, sample)
    return lambda logits: numpy_sample(logits.double().numpy(), random, temperature, top_p)


def numpy_sample(
    logits: np.ndarray, random: np.random.Generator, temperature: float, top_p: float
) -> int:
    weights = np.exp((logits - logits.max()) / temperature)
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    kept, mass = [], 0.0
    for token in order:
        kept.append(int(token))
        mass += probabilities[token]
        if mass >= top_p:
            break
    times = random.standard_exponential(len(logits), dtype=np.float32)
    return min(kept, key=lambda token: float(times[token]) / max(probabilities[token], 1e-300))


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    difference = float((found - expected).abs().max())
    assert difference <= tolerance, f"max abs difference {difference:.3g}"


@torch.no_grad()
def combined_logits(
    lm: FrozenLM, prompt: Prompt, rows: Sequence[Sequence[int]], **options: Any
) -> list[Tensor]:
    """Return each row's logits at its prompt vectors and tokens, through `combine`."""
    batch = combine(lm, prompt, rows, **options)
    given = batch.embeddings, batch.mask, batch.positions, batch.cache
    hidden = lm.hidden(*given, updates=prompt.updates)
    spans = []
    for i, ids in enumerate(rows):
        first = int(batch.first_token[i])
        start = first - int(prompt.vector_mask[i].sum())
        spans.append(lm.logits(hidden[i, start : first + len(ids)]))
    return spans


def pack_ids(lm: FrozenLM, prompt: Prompt, rows: Sequence[Sequence[int]]) -> Packed:
    """Pack rows of token ids."""
    return pack(lm, prompt, lm.embed_rows(rows), [len(r) for r in rows])


@torch.no_grad()
def packed_logits(lm: FrozenLM, prompt: Prompt, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return each row's logits at its tokens, through `pack`."""
    batch = pack_ids(lm, prompt, rows)
    given = batch.embeddings, batch.mask, batch.positions, batch.cache
    hidden = lm.hidden(*given, updates=prompt.updates, owner=batch.owner)
    assert len(hidden) == 1
    spans = zip(batch.first_token, rows, strict=True)
    return [lm.logits(hidden[0, first : first + len(ids)]) for first, ids in spans]


def some_rows(lm: FrozenLM, seed: int = 0) -> tuple[list[Prompt], list[list[int]]]:
    """Return prompts of every form with tokens of very different lengths."""
    lengths = [7, 1, 12, 4, 15, 2, 9, 5]
    return make_prompts(lm, FORMS, seed), make_rows(lengths, seed)


def sliding_window(lm: FrozenLM) -> int | None:
    window: int | None = getattr(lm.model.config, "sliding_window", None)
    return window


@pytest.fixture(scope="session")
def exact_lm(lm: FrozenLM) -> FrozenLM:
    """Every LM, the embedded one in float64.

    On random tokens its float32 rounding alone moves some logits by up to 5e-3; in float64
    the same comparisons agree to less than float32 can tell.
    """
    if lm.name != "embedded":
        return lm
    return FrozenLM(copy.deepcopy(lm.model).double(), lm.tokenizer, lm.name)


# -- embeddings, logits ------------------------------------------------------------------


def test_logits_of_tiny_lms_are_worth_comparing(lm: FrozenLM) -> None:
    """With logits near zero, or deaf to the context, every comparison here would pass."""
    first, second = make_rows([20, 20])
    with torch.no_grad():
        one = naive_logits(lm, Prompt.empty(1), first)
        other = naive_logits(lm, Prompt.empty(1), [*second[:19], first[19]])
    assert float(one.std()) > 0.5
    assert float((one[-1] - other[-1]).abs().max()) > 100 * TOLERANCE


def test_embedding_path_equals_model_on_ids(lm: FrozenLM) -> None:
    (ids,) = make_rows([30])
    with torch.no_grad():
        expected = lm.model(torch.tensor([ids]), use_cache=False).logits[0].float()
    (found,) = combined_logits(lm, Prompt.empty(1), [ids])
    assert_close(found, expected)


def test_every_part_of_the_prompt_matters(lm: FrozenLM) -> None:
    """A prompt that is ignored would pass every comparison of a row with itself."""
    prompt = make_prompt(lm, 3, 4)
    (ids,) = make_rows([5])
    (found,) = combined_logits(lm, prompt, [ids])
    vectors, keys_values = prompt.vectors, prompt.keys_values
    changed = [
        *(
            Prompt(
                vectors * (torch.arange(3) != i)[:, None],
                prompt.vector_mask,
                keys_values,
                prompt.keys_values_mask,
            )
            for i in range(3)
        ),
        *(
            Prompt(
                vectors,
                prompt.vector_mask,
                keys_values * (torch.arange(4) != i)[:, None],
                prompt.keys_values_mask,
            )
            for i in range(4)
        ),
    ]
    changed += [prompt.updated(make_matrices(lm, number)) for number in (1, 2, 3, 4)]
    for other in changed:
        (moved,) = combined_logits(lm, other, [ids])
        assert float((moved[-1] - found[-1]).abs().max()) > 10 * TOLERANCE


# -- promise 3: row independence ---------------------------------------------------------


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("keep_cache", [False, True])
def test_row_in_any_batch_equals_row_alone(exact_lm: FrozenLM, pad: str, keep_cache: bool) -> None:
    lm = exact_lm
    prompts, rows = some_rows(lm)
    found = combined_logits(lm, Prompt.stack(prompts), rows, pad=pad, keep_cache=keep_cache)
    for prompt, ids, logits in zip(prompts, rows, found, strict=True):
        with torch.no_grad():
            assert_close(logits, naive_logits(lm, prompt, ids))


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["left", "right"])
def test_row_independence_of_the_embedded_lm_in_float32(embedded_lm: FrozenLM, pad: str) -> None:
    """On ordinary text, to float32 rounding: 1e-5 of the largest logit (1.6e-4 was seen)."""
    lm = embedded_lm
    texts = ["The capital of France is", "Once upon a time there was a king who", "Hello, my"]
    rows = lm.tokenize(texts)
    (words,) = lm.tokenize(["Answer the question below in one short sentence:"])
    cache = DynamicCache()
    with torch.no_grad():
        lm.model(torch.tensor([words]), past_key_values=cache, use_cache=True)
        vectors = lm.embed(torch.tensor([words]))
    kv = torch.stack([torch.stack([y.keys, y.values], 1) for y in cache.layers], 1)
    prompts = [Prompt.of_vectors(vectors), Prompt.empty(1), Prompt.of_keys_values(kv)]
    found = combined_logits(lm, Prompt.stack(prompts), rows, pad=pad)
    for prompt, ids, logits in zip(prompts, rows, found, strict=True):
        with torch.no_grad():
            expected = naive_logits(lm, prompt, ids)
        assert_close(logits, expected, 1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_each_form_alone_equals_reference(exact_lm: FrozenLM, form: tuple[int, ...]) -> None:
    lm = exact_lm
    prompt = make_prompt(lm, *form)
    (ids,) = make_rows([9])
    with torch.no_grad():
        expected = naive_logits(lm, prompt, ids)
    for pad in ("left", "right"):
        (found,) = combined_logits(lm, prompt, [ids], pad=pad)
        assert_close(found, expected)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_order_of_rows_and_stacks_in_stacks_do_not_matter(exact_lm: FrozenLM, pad: str) -> None:
    lm = exact_lm
    prompts, rows = some_rows(lm, seed=3)
    nested = Prompt.stack([Prompt.stack(prompts[:3]), Prompt.stack(prompts[3:])])
    order = [5, 0, 7, 2, 1, 6, 4, 3]
    found = combined_logits(lm, nested.select(order), [rows[i] for i in order], pad=pad)
    for i, logits in zip(order, found, strict=True):
        with torch.no_grad():
            assert_close(logits, naive_logits(lm, prompts[i], rows[i]))


@pytest.mark.parametrize("pad", ["left", "right"])
def test_changing_one_row_never_changes_another(exact_lm: FrozenLM, pad: str) -> None:
    lm = exact_lm
    prompts, rows = some_rows(lm)
    before = combined_logits(lm, Prompt.stack(prompts), rows, pad=pad)
    j = 4
    other_ids = make_rows([len(rows[j])], seed=99)[0]
    for changed_prompt, changed_ids, exact in (
        (prompts[j], other_ids, True),
        (make_prompt(lm, *FORMS[j], seed=77), rows[j], True),
        (make_prompt(lm, 5, 6, seed=77), make_rows([18], seed=5)[0], False),
        (Prompt.empty(1), [2], False),
    ):
        new_prompts, new_rows = [*prompts], [*rows]
        new_prompts[j], new_rows[j] = changed_prompt, changed_ids
        after = combined_logits(lm, Prompt.stack(new_prompts), new_rows, pad=pad)
        for i in range(len(rows)):
            if i == j:
                continue
            if exact:  # the same shapes: not even rounding may differ
                assert torch.equal(after[i], before[i])
            assert_close(after[i], before[i])
        if changed_ids is not rows[j]:
            assert not torch.equal(after[j][-1], before[j][-1])


def test_special_tokens_come_from_the_frame_and_never_from_a_text(
    tiny_lm: Callable[[str], FrozenLM],
) -> None:
    lm = tiny_lm("llama")
    end = lm.tokenizer.eos_token
    (framed,) = lm.tokenize([f"a{end}"], markup=True)
    assert framed[-1] == lm.tokenizer.eos_token_id
    (ids,) = lm.tokenize([f"a{end}b"])
    assert lm.tokenizer.eos_token_id not in ids
    assert lm.text(ids) == f"a{end}b", "it is read as the text it is"
    (row,) = Skill.base(lm).input_ids([f"a{end}b"])
    assert lm.tokenizer.eos_token_id not in row


@torch.no_grad()
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_every_text_begins_as_the_lms_own_tokenizer_has_it(
    arch: str, tiny_lm: Callable[[str], FrozenLM], tmp_path: Path
) -> None:
    """As Llama's, Mistral's and Gemma's: their plain texts begin with a token of its own, once."""
    plain = tiny_lm(arch)
    assert plain.start_ids == (), "an end that a tokenizer adds is no beginning"
    tokenizer = copy.deepcopy(plain.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 1)]
    )
    tokenizer.chat_template = "<pad>{% for m in messages %}{{ m.content }}{% endfor %}"
    lm = FrozenLM(plain.model, tokenizer, "with a beginning")
    assert lm.start_ids == (1,)
    text, separator = "the capital of france", SkillConfig().format.separator
    skill = Skill.base(lm, SkillConfig())
    (ids,) = skill.input_ids([text])
    assert ids == tokenizer(text)["input_ids"] + lm.tokenize([separator])[0]
    own = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].float()
    (whole,) = skill.score([text], [["two"]])[0]
    first = skill.answer_ids(["two"])[0][0]
    (alone,) = scored_ids(skill, [text], [ids], [[[first]]])[0]
    assert alone.logprob == pytest.approx(float(own.log_softmax(-1)[first]), abs=1e-4)
    assert whole.logprob < alone.logprob
    chat = Skill.base(lm, SkillConfig(format=TextFormat(chat=True)))
    assert chat.input_ids([text])[0].count(1) == 1
    assert skill.input_room() == Skill.base(plain, SkillConfig()).input_room() - 1
    (tmp_path / "t.txt").write_text("one two three four five six seven eight nine ten\n")
    for example in RunningText(lm, [str(tmp_path / "t.txt")], 4).examples():
        assert example.input_ids[0] == 1
        assert len(example.input_ids) == 2


def test_too_long_row_is_named(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("llama")
    prompt = Prompt.stack(make_prompts(lm, [(0, 0), (2, 3), (0, 0)]))
    exact = make_rows([5, lm.max_positions - 5, 1])
    combine(lm, prompt, exact)
    pack_ids(lm, prompt, exact)
    config = DecodingConfig(max_new_tokens=2)
    for run in (combine, pack_ids, lambda *a: generate(*a, config)):
        with pytest.raises(WindowError, match=r"row 2 .*65 positions.*64"):
            run(lm, prompt, [exact[0], [*exact[1], 5], exact[2]])
        with pytest.raises(WindowError, match=r"row 3 .*no tokens"):
            run(lm, prompt, [exact[0], exact[1], []])
    with pytest.raises(WindowError, match="row 2"):
        score(lm, prompt, exact, [[[3]], [[3], [4, 5]], [[3]]])
    with pytest.raises(WindowError, match="no tokens"):
        score(lm, prompt, exact, [[[3]], [[]], [[3]]])


def test_prefix_of_another_shape_is_refused(tiny_lm: Callable[[str], FrozenLM]) -> None:
    prompt = make_prompt(tiny_lm("qwen3"), 0, 3)
    with pytest.raises(ValueError, match="LM needs"):
        combine(tiny_lm("llama"), prompt, [[5, 6]])


@torch.no_grad()
def test_states_between_layers_are_the_updated_ones(exact_lm: FrozenLM) -> None:
    lm, (ids,) = exact_lm, make_rows([4])
    matrices, embedded = make_matrices(lm, 1), lm.embed_rows([ids])
    assert isinstance(matrices, Matrices)
    plain, found = (
        states.states(lm, prompt, embedded, [4], taps=(0, 1)).values[:, :4]
        for prompt in (Prompt.empty(1), Prompt.empty(1).updated(matrices))
    )
    assert torch.equal(found[0], plain[0])
    x = plain[1].double()
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    change = normal @ matrices.down[0].double() @ matrices.up[0].double() * float(matrices.unit[0])
    assert float(change.abs().max()) > 0.01 * float(x.std())
    assert_close(found[1].double(), x + change)


# -- packing -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(0, 0), (5, 0), (0, 6), (2, 3), (0, 2, 1), (2, 3, 3)])
def test_pack_of_a_shared_prompt_equals_combine(exact_lm: FrozenLM, form: tuple[int, ...]) -> None:
    lm = exact_lm
    prompt = make_prompt(lm, *form)
    rows = make_rows([7, 1, 3, 5])
    shared = prompt.repeated(4)
    assert shared.shared
    assert can_pack(lm, shared, [len(r) for r in rows])
    packed, combined = packed_logits(lm, shared, rows), combined_logits(lm, shared, rows)
    for ids, found, full in zip(rows, packed, combined, strict=True):
        assert_close(found, full[-len(ids) :])
        with torch.no_grad():
            assert_close(found, naive_logits(lm, prompt, ids)[-len(ids) :])
    selected = packed_logits(lm, shared.select([2, 0]), [rows[2], rows[0]])
    assert_close(selected[0], packed[2])
    assert_close(selected[1], packed[0])


@pytest.mark.parametrize("form", [(4, 0), (0, 5), (3, 0, 1), (0, 2, 3), "mixture"])
def test_pack_of_own_prompts_equals_combine(exact_lm: FrozenLM, form: Any) -> None:
    lm = exact_lm
    forms = FORMS if form == "mixture" else [form] * 4
    prompts = make_prompts(lm, forms)
    rows = make_rows([3, 1, 6, 2, 5, 4, 1, 7][: len(forms)])
    prompt = Prompt.stack(prompts)
    assert can_pack(lm, prompt, [len(r) for r in rows])
    packed, combined = packed_logits(lm, prompt, rows), combined_logits(lm, prompt, rows)
    for one, ids, found, full in zip(prompts, rows, packed, combined, strict=True):
        assert_close(found, full[-len(ids) :])
        with torch.no_grad():
            assert_close(found, naive_logits(lm, one, ids)[-len(ids) :])


def test_changing_one_packed_row_never_changes_another(exact_lm: FrozenLM) -> None:
    lm = exact_lm
    prompts, rows = make_prompts(lm, FORMS), make_rows([3, 1, 6, 2, 5, 4, 1, 7])
    before = packed_logits(lm, Prompt.stack(prompts), rows)
    for j in (2, 5):
        new_prompts, new_rows = [*prompts], [*rows]
        new_prompts[j] = make_prompt(lm, *FORMS[j], seed=50)
        new_rows[j] = make_rows([len(rows[j])], seed=50)[0]
        after = packed_logits(lm, Prompt.stack(new_prompts), new_rows)
        for i in range(len(rows)):
            assert torch.equal(after[i], before[i]) == (i != j)


def test_can_pack_ends_at_the_sliding_window(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("gemma2")
    window = sliding_window(lm)
    assert window is not None
    prompts = make_prompts(lm, [(0, 0), (2, 2)])
    prompt = Prompt.stack(prompts)
    inside = make_rows([window - 4, window - 4])
    assert can_pack(lm, prompt, [len(r) for r in inside])
    for one, ids, found in zip(prompts, inside, packed_logits(lm, prompt, inside), strict=True):
        with torch.no_grad():
            assert_close(found, naive_logits(lm, one, ids)[-len(ids) :])
    assert can_pack(lm, Prompt.empty(2), [window, 3])
    assert not can_pack(lm, Prompt.empty(2), [window + 1, 3])
    assert not can_pack(lm, prompt, [3, window - 3])
    assert can_pack(tiny_lm("llama"), prompt, [50, 40])


# -- objective ---------------------------------------------------------------------------


def examples_of(rows: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Example]:
    pairs = zip(rows, answers, strict=True)
    return [Example("", list(ids), list(answer), "task") for ids, answer in pairs]


def naive_losses(lm: FrozenLM, prompt: Prompt, example: Example) -> Tensor:
    logits = naive_logits(lm, prompt, [*example.input_ids, *example.answer_ids])
    logprobs = torch.log_softmax(logits, -1)
    n = len(example.answer_ids)
    at = len(logits) - 1 - n + torch.arange(n)
    return -logprobs[at, torch.tensor(example.answer_ids)]


@pytest.mark.parametrize("path", ["pack", "combine", "beyond a sliding window"])
def test_answer_losses_equal_reference(
    lm: FrozenLM, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(lm, FORMS)
    longer = 12 if path.startswith("beyond") else 0
    rows = make_rows([2 + longer, 1, 3, 1 + longer, 3, 2, 1, 2 + longer])
    examples = examples_of(rows, make_rows([1, 3, 2, 4, 1, 2, 5, 3], seed=8))
    prompt = Prompt.stack(prompts)
    packable = can_pack(lm, prompt, [e.tokens for e in examples])
    if path == "combine":
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    elif path == "pack":
        assert packable
    else:
        assert packable == (sliding_window(lm) is None)
    with torch.no_grad():
        found = answer_losses(lm, prompt, examples)
        expected = [naive_losses(lm, p, e) for p, e in zip(prompts, examples, strict=True)]
    assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("path", ["pack", "combine"])
@pytest.mark.parametrize("shared", [False, True])
def test_prompt_gradients_equal_reference(
    lm: FrozenLM, path: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "combine":
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    examples = examples_of(make_rows([3, 1, 4]), make_rows([2, 4, 1], seed=8))
    start = make_prompts(lm, [(2, 3)] * (1 if shared else 3))
    weights = torch.linspace(0.5, 2.0, 7)

    def leaves() -> list[Prompt]:
        return [
            Prompt(
                p.vectors.clone().requires_grad_(),
                p.vector_mask,
                p.keys_values.clone().requires_grad_(),
                p.keys_values_mask,
            )
            for p in start
        ]

    ours, reference = leaves(), leaves()
    prompt = ours[0].repeated(3) if shared else Prompt.stack(ours)
    (answer_losses(lm, prompt, examples) * weights).sum().backward()
    rows = reference * 3 if shared else reference
    losses = [naive_losses(lm, p, e) for p, e in zip(rows, examples, strict=True)]
    (torch.cat(losses) * weights).sum().backward()
    for mine, plain in zip(ours, reference, strict=True):
        for name in ("vectors", "keys_values"):
            found, expected = getattr(mine, name).grad, getattr(plain, name).grad
            scale = float(expected.abs().max())
            assert scale > 0
            assert_close(found / scale, expected / scale)
    assert all(p.grad is None for p in lm.model.parameters())


# -- promise 4: cached = uncached --------------------------------------------------------


@pytest.fixture
def with_ends(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[list[int]]], set[int]]:
    """Make tokens of given greedy answers end tokens, so that rows end at different steps."""

    def choose(answers: list[list[int]]) -> set[int]:
        ends = {a[min(2 * i + 1, len(a) - 1)] for i, a in enumerate(answers[::2])}
        monkeypatch.setattr(lm, "end_ids", tuple(ends))
        return ends

    return choose


@pytest.mark.parametrize(
    "forms", [[(0, 0)] * 5, [(4, 0)] * 5, [(0, 5)] * 5, [(0, 5, 1)] * 5, [(0, 5, 3)] * 5, FORMS]
)
def test_greedy_equals_loop_without_cache(
    lm: FrozenLM,
    forms: Sequence[tuple[int, ...]],
    with_ends: Callable[[list[list[int]]], set[int]],
) -> None:
    steps = 6 if lm.name == "embedded" else 12  # its loop from scratch takes long
    prompts, rows = make_prompts(lm, forms), make_rows([3, 14, 1, 8, 6, 11, 2, 5][: len(forms)])
    config = DecodingConfig(max_new_tokens=steps)
    pairs = list(zip(prompts, rows, strict=True))
    if lm.name == "embedded":
        pairs = pairs[-4:]
        prompts, rows = [p for p, _ in pairs], [r for _, r in pairs]
    free = [naive_generate(lm, p, ids, steps) for p, ids in pairs]
    ends = with_ends(free)
    # Greedy with an end token is greedy without it, cut after that token.
    expected = [
        a[: next((i + 1 for i, token in enumerate(a) if token in ends), steps)] for a in free
    ]
    assert len({len(a) for a in expected}) > 1, "all rows end together: the test is too easy"
    found = generate(lm, Prompt.stack(prompts), rows, config)
    for row, (several, tokens) in enumerate(zip(found, expected, strict=True)):
        assert len(several) == 1
        assert several[0].token_ids == tokens, f"row {row}"
        assert several[0].finish == ("stop" if tokens[-1] in ends else "length")
        assert several[0].text == lm.text([t for t in tokens if t not in ends])


def test_logprob_equals_reference(lm: FrozenLM) -> None:
    prompts, rows = make_prompts(lm, FORMS[1::3]), make_rows([3, 9, 5])
    config = DecodingConfig(max_new_tokens=6, temperature=0.7, n=2)
    for prompt, ids, several in zip(
        prompts, rows, generate(lm, Prompt.stack(prompts), rows, config), strict=True
    ):
        for completion in several:
            with torch.no_grad():
                loss = naive_losses(lm, prompt, Example("", ids, completion.token_ids, ""))
            assert completion.logprob == pytest.approx(-float(loss.sum()), abs=1e-3)


def test_samples_sharing_a_prefill_equal_separate_runs(lm: FrozenLM) -> None:
    forms = [(0, 0), (3, 0), (0, 4, 1), (2, 3, 2)][-2 if lm.name == "embedded" else 0 :]
    prompts, rows = make_prompts(lm, forms), make_rows([3, 14, 1, 6][: len(forms)])
    config = DecodingConfig(max_new_tokens=6, temperature=0.9, top_p=0.9, n=3, seed=5)
    found = generate(lm, Prompt.stack(prompts), rows, config)
    for prompt, ids, several in zip(prompts, rows, found, strict=True):
        expected = [
            naive_generate(lm, prompt, ids, 6, numpy_sampler(5, ids, sample, 0.9, 0.9))
            for sample in range(3)
        ]
        assert [c.token_ids for c in several] == expected
        assert len({tuple(tokens) for tokens in expected}) > 1


def test_sampling_of_a_row_does_not_depend_on_its_batch(
    tiny_lm: Callable[[str], FrozenLM],
) -> None:
    lm = tiny_lm("llama")
    prompts, rows = some_rows(lm)
    config = DecodingConfig(max_new_tokens=8, temperature=1.0, n=2, seed=3)
    together = generate(lm, Prompt.stack(prompts), rows, config)
    for prompt, ids, several in zip(prompts, rows, together, strict=True):
        (alone,) = generate(lm, prompt, [ids], config)
        assert [c.token_ids for c in alone] == [c.token_ids for c in several]
    assert together[0][0].token_ids != together[0][1].token_ids
    other = generate(lm, prompts[0], rows[:1], config.model_copy(update={"seed": 4}))
    assert other[0][0].token_ids != together[0][0].token_ids


def test_generation_ends_with_the_window(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run into the window at different steps, also when only the last id fits."""
    monkeypatch.setattr(lm, "end_ids", ())
    window = 24
    monkeypatch.setattr(lm, "max_positions", window)
    prompts, rows = make_prompts(lm, [(0, 0), (3, 0), (0, 4)]), make_rows([24, 17, 18])
    found = generate(lm, Prompt.stack(prompts), rows, DecodingConfig(max_new_tokens=40))
    for prompt, ids, (completion,), room in zip(prompts, rows, found, (1, 5, 3), strict=True):
        assert completion.finish == "length"
        assert len(completion.token_ids) == room
        assert completion.token_ids == naive_generate(lm, prompt, ids, 40)


def test_score_equals_log_softmax_of_full_sequences(lm: FrozenLM) -> None:
    prompts, rows = make_prompts(lm, FORMS), make_rows([3, 14, 1, 8, 6, 11, 2, 5])
    lengths = [[1, 4], [2], [1, 1, 6], [], [3, 2], [5, 1], [1], [2, 7]]
    continuations = [make_rows(several, seed=20 + i) for i, several in enumerate(lengths)]
    found = score(lm, Prompt.stack(prompts), rows, continuations)
    assert [[s.tokens for s in several] for several in found] == lengths
    for prompt, ids, several, scores in zip(prompts, rows, continuations, found, strict=True):
        for continuation, one in zip(several, scores, strict=True):
            with torch.no_grad():
                losses = naive_losses(lm, prompt, Example("", ids, continuation, ""))
            assert one.logprob == pytest.approx(-float(losses.sum()), abs=1e-3)
            assert one.mean == pytest.approx(-float(losses.mean()), abs=1e-3)
    ones = score(lm, Prompt.empty(1), [[5, 6]], [[[7], [8]]])
    with torch.no_grad():
        last = torch.log_softmax(naive_logits(lm, Prompt.empty(1), [5, 6])[-1], -1)
    assert [s.logprob for s in ones[0]] == pytest.approx(last[[7, 8]].tolist(), abs=TOLERANCE)


def test_score_tells_first_choices(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("llama")
    prompts, rows = make_prompts(lm, [(0, 0), (2, 3)]), make_rows([3, 9])
    best = [naive_generate(lm, prompt, ids, 4) for prompt, ids in zip(prompts, rows, strict=True)]
    assert all(len(own) > 1 for own in best)
    several = [
        [own, own[:1], [own[0] ^ 1, *own[1:]], [*own[:-1], own[-1] ^ 1], [own[0] ^ 1]]
        for own in best
    ]
    for own in score(lm, Prompt.stack(prompts), rows, several):
        assert [one.greedy for one in own] == [True, True, False, False, False]


# -- sampling ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 1e-6])
def test_next_tokens_equal_numpy(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (200, 50)).astype(np.float32)

    def randoms() -> list[np.random.Generator]:
        return [np.random.default_rng(i) for i in range(200)]

    found = next_tokens(torch.from_numpy(logits), randoms(), temperature, top_p)
    pairs = zip(logits.astype(np.float64), randoms(), strict=True)
    expected = [numpy_sample(row, random, temperature, top_p) for row, random in pairs]
    assert found.tolist() == expected
    if top_p < 1e-3:
        assert found.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("compiled", [True, False])
def test_likeliest_equals_argmax_and_logsumexp(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr("shoulders.lm.sampling.available", lambda: None)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 1301, generator=random) * 5
    logits[1, [700, 1200]] = 60.0  # the first of equal ones
    logits[2] = -logits[2].abs() - 50
    logits[3], logits[3, 1300] = -torch.inf, 2.0
    logits[4, 600] = torch.nan
    logits[5] = -0.0
    ids, whole = likeliest(logits)
    assert ids.tolist() == logits.argmax(-1).tolist()
    assert ids[4] == 600
    torch.testing.assert_close(whole, logits.logsumexp(-1), rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_rounding_hardly_ever_changes_a_draw(top_p: float) -> None:
    """Neither in a flat tail, where thousands of tokens are less likely than rounding is large."""
    normal = np.random.default_rng(0).normal
    logits = torch.from_numpy(normal(0, 2, (200, 10_000)).astype(np.float32))
    noise = torch.from_numpy(normal(0, 1e-5, logits.shape).astype(np.float32))
    found, again = (
        next_tokens(values, [np.random.default_rng(i) for i in range(200)], 1.3, top_p)
        for values in (logits, logits + noise)
    )
    assert torch.equal(found, again)


def test_next_tokens_have_the_right_frequencies() -> None:
    probabilities = np.array([0.4, 0.25, 0.2, 0.1, 0.05])
    draws = 40_000
    logits = torch.from_numpy(np.log(probabilities[[3, 0, 4, 1, 2]])).float().repeat(draws, 1)
    for top_p, kept in ((1.0, probabilities), (0.8, np.array([0.4, 0.25, 0.2, 0, 0]) / 0.85)):
        randoms = [np.random.default_rng(0)] * draws  # one stream, draw by draw
        found = np.bincount(next_tokens(logits, randoms, 1.0, top_p), minlength=5)[[1, 3, 4, 0, 2]]
        error = 4 * np.sqrt(kept * (1 - kept) / draws)
        assert (np.abs(found / draws - kept) <= error).all()


class Drawn:
    """A stream whose times are given."""

    def __init__(self, *times: float) -> None:
        self.times = times

    def standard_exponential(self, size: int, dtype: Any) -> np.ndarray:
        return np.array(self.times[:size], dtype=dtype)


def test_next_tokens_at_the_edges() -> None:
    def chosen(logits: Tensor, times: Sequence[float], temperature: float, top_p: float) -> int:
        return int(next_tokens(logits, [Drawn(*times)], temperature, top_p))  # type: ignore[list-item]

    logits = torch.tensor([[0.0, 1.0, -1.0]])
    assert chosen(logits, (1, 1, 1), 1.0, 1.0) == 1
    assert chosen(logits, (1, 1, 0), 1.0, 1.0) == 2, "a time of nothing wins"
    assert chosen(logits, (0.1, 1, 0), 1.0, 0.9) == 0, "but not for what is cut off"
    assert chosen(logits, (1, 50, 0), 1.0, 1e-9) == 1
    huge = torch.tensor([[-1e30, 3.0, 1e4]])
    assert chosen(huge, (0, 0, 50), 0.01, 0.999) == 2
    for tiny in (1e-308, 5e-324):
        assert chosen(logits * 30, (0, 50, 0), tiny, 1.0) == 1
        assert chosen(-logits.abs() - 40, (50, 0, 0), tiny, 1.0) == 0


def test_next_tokens_of_a_row_of_nan_are_its_own_affair() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [torch.nan] * 3, [0.0, torch.inf, 0.0]])
    times = Drawn(1, 1, 1)
    found = next_tokens(logits, [times] * 3, 1.0, 0.9).tolist()  # type: ignore[list-item]
    assert found[0] == 1
    assert all(0 <= token < 3 for token in found)


def test_sample_stream_depends_on_seed_tokens_and_sample() -> None:
    draws = {
        sample_stream(seed, ids, sample).random()
        for seed in (0, 1)
        for ids in ([1, 2], [2, 1], [1])
        for sample in (0, 1)
    }
    assert len(draws) == 12
    assert sample_stream(1, [3], 2).random() == sample_stream(1, [3], 2).random()


# -- text: stop strings, streaming, characters over several tokens ---------------------------


def scripted(
    lm: FrozenLM, ids: Sequence[int], config: DecodingConfig, patch: pytest.MonkeyPatch
) -> tuple[Completion, list[Delta]]:
    """Stream one row of which the LM says `ids`, whatever it reads."""
    script = iter(ids)

    def logits(hidden: Tensor) -> Tensor:
        row = torch.zeros(1, lm.vocab_size)
        row[0, next(script)] = 9.0
        return row

    with patch.context() as inner:
        inner.setattr(lm, "logits", logits)
        deltas = list(stream(lm, Prompt.empty(1), [[5]], config))
    assert [d.completion is None for d in deltas] == [True] * (len(deltas) - 1) + [False]
    completion = deltas[-1].completion
    assert completion is not None
    assert "".join(d.text for d in deltas) == completion.text
    return completion, deltas


def characters(lm: FrozenLM, text: str) -> list[int]:
    """Return one token per byte of `text`."""
    ids = [i for c in text.encode() for i in lm.tokenizer.convert_tokens_to_ids([_BYTES[c]])]
    assert lm.text(ids) == text
    return ids


def _byte_symbols() -> dict[int, str]:
    """Return the byte-level BPE alphabet (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


_BYTES = _byte_symbols()


def test_stop_string_over_several_tokens(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    ids = characters(lm, "one\n\nQuestion: two")
    config = DecodingConfig(max_new_tokens=len(ids), stop=("Question:", "zzz"))
    completion, deltas = scripted(lm, ids, config, monkeypatch)
    assert completion.text == "one\n\n"
    assert completion.finish == "stop"
    assert completion.token_ids == ids[: len("one\n\nQuestion:")]
    assert "Q" not in "".join(d.text for d in deltas)


def test_stop_string_inside_a_token(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    (ids,) = lm.tokenize(["the capital of France"])
    assert len(ids) < 12, "this needs tokens of several characters"
    config = DecodingConfig(max_new_tokens=len(ids), stop=("pit", "ap"))
    completion, _ = scripted(lm, ids, config, monkeypatch)
    assert completion.text == "the c"


def test_almost_a_stop_string_is_shown_after_all(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    ids = characters(lm, "a#b##c#")
    config = DecodingConfig(max_new_tokens=len(ids), stop=("###", "#bb"))
    completion, deltas = scripted(lm, ids, config, monkeypatch)
    assert completion.text == "a#b##c#"
    assert completion.finish == "length"
    assert [d.text for d in deltas] == ["a", "#b", "##c", "#"]


def test_end_token_is_not_text(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    ids = [*characters(lm, "ab"), lm.end_ids[0], *characters(lm, "c")]
    completion, _ = scripted(lm, ids, DecodingConfig(max_new_tokens=9), monkeypatch)
    assert (completion.text, completion.finish) == ("ab", "stop")
    assert completion.token_ids == ids[:3]


def test_half_a_character_is_held_back(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    text = "é€😀x"
    ids = characters(lm, text)
    assert len(ids) == len(text.encode())
    completion, deltas = scripted(lm, ids, DecodingConfig(max_new_tokens=len(ids)), monkeypatch)
    assert completion.text == text
    assert [d.text for d in deltas] == ["é", "€", "😀", "x"]


def test_stop_string_with_a_character_over_several_tokens(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While half of `€` is there, the `x` before it may be the beginning of the stop string."""
    lm = tiny_lm("llama")
    ids = characters(lm, "ax€b")
    config = DecodingConfig(max_new_tokens=len(ids), stop=("x€",))
    completion, deltas = scripted(lm, ids, config, monkeypatch)
    assert completion.text == "a"
    assert [d.text for d in deltas] == ["a", ""]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    text=st.text("ab€é😀\n", min_size=1, max_size=12),
    stop=st.lists(st.text("ab€é\n", min_size=1, max_size=3), max_size=2),
    limit=st.integers(1, 30),
)
def test_deltas_join_to_the_text(
    tiny_lm: Callable[[str], FrozenLM], text: str, stop: list[str], limit: int
) -> None:
    lm = tiny_lm("llama")
    ids = [*characters(lm, text), lm.end_ids[0]]
    expected, finish = "", ""
    for end in range(1, min(limit, len(ids)) + 1):
        expected = lm.text(ids[:end])
        cuts = [expected.find(s) for s in stop if s in expected]
        if cuts:
            expected, finish = expected[: min(cuts)], "stop"
            break
        finish = "stop" if end == len(ids) else "length"
    config = DecodingConfig(max_new_tokens=limit, stop=tuple(stop))
    completion, _ = scripted(lm, ids, config, pytest.MonkeyPatch())
    assert (completion.text, completion.finish) == (expected, finish)


def test_streams_of_a_batch_join_to_generate(tiny_lm: Callable[[str], FrozenLM]) -> None:
    lm = tiny_lm("llama")
    prompts, rows = some_rows(lm)
    config = DecodingConfig(max_new_tokens=10, temperature=1.0, n=2)
    prompt = Prompt.stack(prompts)
    expected = generate(lm, prompt, rows, config)
    texts = [["", ""] for _ in rows]
    ended: list[tuple[int, int]] = []
    for delta in stream(lm, prompt, rows, config):
        assert (delta.row, delta.sample) not in ended
        texts[delta.row][delta.sample] += delta.text
        if delta.completion is not None:
            ended.append((delta.row, delta.sample))
    assert len(ended) == 2 * len(rows)
    assert texts == [[c.text for c in several] for several in expected]


def test_unused_room_of_a_cache_holds_no_garbage(tiny_lm: Callable[[str], FrozenLM]) -> None:
    """What memory happened to hold must not reach rows that are shorter than others."""
    lm = tiny_lm("llama")
    assert lm.blocks is not None
    prompt = Prompt.stack(make_prompts(lm, [(0, 4), (0, 0)]))
    cache = Cache.of(prompt, lm.blocks.cache_shape, 64, lm.dtype)
    assert torch.isfinite(cache.values).all()
    assert not cache.values[:, :, 1].any()


def test_a_cache_that_grows_changes_no_token(
    tiny_lm: Callable[[str], FrozenLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm("llama")
    prompt, rows = Prompt.stack(make_prompts(lm, [(0, 4), (3, 0)])), make_rows([5, 2])
    config = DecodingConfig(max_new_tokens=20, min_new_tokens=20)
    expected = [c.token_ids for (c,) in generate(lm, prompt, rows, config)]
    monkeypatch.setattr("shoulders.lm.reading.FIRST_ROOM", 1)
    assert [c.token_ids for (c,) in generate(lm, prompt, rows, config)] == expected
