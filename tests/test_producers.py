"""Every producer there is: the interface's contract, found by discovery and not by a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import RecipeError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states
from shoulders.prompts.build import (
    build_producer,
    producer_config,
    producer_kinds,
    rates_of,
)
from shoulders.prompts.interface import Producer, Surroundings
from shoulders.training.configs import OptimizerConfig
from shoulders.training.objective import Example, answer_losses
from shoulders.training.optimizer import make_optimizer

LENGTH = 5
TEXTS = [
    "The capital of France",
    "no",
    "one two three four five six seven eight nine ten",
    "Who wrote the book?",
]
TEXT_INIT = {"source": "text", "text": "Is this review positive or negative?"}
GENERATOR = {"width": 24, "heads": 4, "layers": 2}

pytestmark = pytest.mark.usefixtures("own_cache")


def kinds() -> list[Any]:
    """Return every kind with each way its options can matter here."""
    found: list[Any] = []
    for kind in producer_kinds():
        found.append(pytest.param({"kind": kind}, id=kind))
        if takes(kind, "generator"):
            soft = {**GENERATOR, "encoder_prompt": 3}
            spec = {"kind": kind, "generator": soft}
            found.append(pytest.param(spec, id=f"{kind}-soft"))
    return found


def takes(kind: str, field: str) -> bool:
    return field in type(producer_config({"kind": kind})).model_fields


@pytest.fixture(params=kinds())
def spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    given: dict[str, Any] = {**request.param, "length": LENGTH}
    if takes(given["kind"], "generator"):
        given.setdefault("generator", GENERATOR)
    return given


@pytest.fixture(params=["llama", "gemma"])
def arch(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def around(
    arch: str, tiny_lm: Callable[[str], FrozenLM], tiny_encoder: FrozenEncoder
) -> Surroundings:
    return Surroundings(tiny_lm(arch), lambda _: tiny_encoder)


def started(spec: dict[str, Any], around: Surroundings, seed: int = 0) -> Producer:
    producer = build_producer(spec, around)
    producer.initialise(around.lm, torch.Generator().manual_seed(seed))
    return producer


def moved(spec: dict[str, Any], around: Surroundings) -> Producer:
    """Return a producer away from its start, where networks that start at zero do act."""
    producer = started(spec, around)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in producer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return producer


def content(prompt: Prompt) -> Tensor:
    """Return the one form that the prompt has, `[b, ...]`."""
    return prompt.keys_values if prompt.vectors.shape[1] == 0 else prompt.vectors


def reads_input(spec: dict[str, Any]) -> bool:
    return not spec["kind"].startswith("static")


@torch.no_grad()
def test_shapes(spec: dict[str, Any], around: Surroundings) -> None:
    producer = moved(spec, around)
    lm, shape = around.lm, around.lm.prefix_shape
    assert producer.length == LENGTH
    for texts in (TEXTS, TEXTS[:1]):
        b = len(texts)
        prompt = producer(texts)
        assert isinstance(prompt, Prompt)
        assert prompt.rows == b
        assert prompt.lengths().tolist() == [LENGTH] * b
        vectors = prompt.vectors.shape == (b, LENGTH, lm.hidden_size)
        keys_values = prompt.keys_values.shape == (
            (b, shape.layers, 2, shape.kv_heads, LENGTH, shape.head_dim)
        )
        assert vectors != keys_values
        assert torch.isfinite(content(prompt)).all()
        assert content(prompt).dtype == torch.float32
        assert reads_input(spec) != prompt.shared


@torch.no_grad()
def test_row_depends_on_its_text_alone(spec: dict[str, Any], around: Surroundings) -> None:
    producer = moved(spec, around)
    together = content(producer(TEXTS))
    for row, text in enumerate(TEXTS):
        alone = content(producer([text]))[0]
        assert float((together[row] - alone).abs().max()) <= 1e-5 * float(alone.abs().max())
    reordered = content(producer([TEXTS[2], TEXTS[0]]))
    assert float((reordered[0] - together[2]).abs().max()) <= 1e-5 * float(together.abs().max())
    differs = float((together[0] - together[1]).abs().max()) > 1e-3 * float(together.std())
    assert differs == reads_input(spec)


@torch.no_grad()
def test_an_empty_text_has_a_prompt(spec: dict[str, Any], around: Surroundings) -> None:
    producer = moved(spec, around)
    for texts in (["", TEXTS[0]], [""]):
        assert torch.isfinite(content(producer(texts))).all()


@torch.no_grad()
def test_start_is_the_static_prompt_exactly(spec: dict[str, Any], around: Surroundings) -> None:
    """Whatever the text, an untrained producer gives the static prompt of its form."""
    producer = started(spec, around, seed=3)
    found = producer(TEXTS)
    assert all(torch.equal(content(found)[0], row) for row in content(found))
    static = [
        content(other(TEXTS[:1]))
        for kind in producer_kinds()
        for other in [started({"kind": kind, "length": LENGTH}, around, seed=3)]
        if kind.startswith("static")
    ]
    same_form = [s for s in static if s.shape[1:] == content(found).shape[1:]]
    assert same_form
    assert all(torch.equal(content(found)[:1], other) for other in same_form)


def test_untrained_updates_change_nothing(spec: dict[str, Any], around: Surroundings) -> None:
    if not takes(spec["kind"], "rank"):
        pytest.skip("a producer without updates")
    ids = [[5, 9, 20, 33]]
    with torch.no_grad():
        for producer, same in ((started(spec, around), True), (moved(spec, around), False)):
            prompt = producer(TEXTS[:1])
            assert prompt.updates is not None
            plain = dataclasses.replace(prompt, updates=None)
            found, expected = (
                states(around.lm, p, around.lm.embed_rows(ids), [4]).values for p in (prompt, plain)
            )
            assert torch.equal(found, expected) == same


@torch.no_grad()
def test_inputs_of_one_skill_share_their_updates(
    spec: dict[str, Any], around: Surroundings
) -> None:
    if not takes(spec["kind"], "rank"):
        pytest.skip("a producer without updates")
    producer, other = moved(spec, around), moved(spec, around)
    updates = Prompt.stack([producer(TEXTS[:1]), other(TEXTS[:2]), producer(TEXTS)]).updates
    assert updates is not None
    assert updates.of == (0, 1, 1, 0, 0, 0, 0)


def own_values(lm: FrozenLM, ids: Sequence[int], like: Tensor) -> Tensor:
    """Return the LM's own embeddings, or keys/values, of `ids` in the shape of `like`."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        if like.dim() == 3:
            return lm.embed(tokens)
        cache = DynamicCache()
        lm.model(tokens, past_key_values=cache, use_cache=True)
    return torch.stack([torch.stack([y.keys, y.values], 1) for y in cache.layers], 1)


def assert_starts_from(producer: Producer, lm: FrozenLM, ids: Sequence[int]) -> None:
    with torch.no_grad():
        found = content(producer(TEXTS[:1]))
    expected = own_values(lm, ids, found)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5


@pytest.mark.parametrize("length", [2, LENGTH, 23])
def test_start_from_text(spec: dict[str, Any], around: Surroundings, length: int) -> None:
    (ids,) = around.lm.tokenize([TEXT_INIT["text"]])
    assert 2 < len(ids) < 23
    repeated = [ids[i % len(ids)] for i in range(length)]
    producer = started({**spec, "length": length, "init": TEXT_INIT}, around)
    assert_starts_from(producer, around.lm, repeated)


def test_start_from_labels(spec: dict[str, Any], around: Surroundings) -> None:
    init = {"labels": ["positive", "negative"]}  # its source is what is given
    (ids,) = around.lm.tokenize(["positive negative"])
    producer = started({**spec, "init": init}, around)
    assert_starts_from(producer, around.lm, [ids[i % len(ids)] for i in range(LENGTH)])


def test_start_from_vocabulary(spec: dict[str, Any], around: Surroundings) -> None:
    """The start is some ordinary tokens among the `top`, other ones for another seed."""
    lm, top = around.lm, 6
    if lm.prefix_shape.layers != 3:
        pytest.skip("written for tiny LMs")
    with pytest.raises(RecipeError, match=r"init\.top: the 1 lowest token ids .* are all special"):
        started({**spec, "init": {"source": "vocabulary", "top": 1}}, around)
    init = {"source": "vocabulary", "top": top}
    allowed = set(range(top)) - set(lm.tokenizer.all_special_ids)
    assert len(allowed) == 4
    with torch.no_grad():
        found = content(started({**spec, "init": init}, around)(TEXTS[:1]))
        if found.dim() == 3:
            one, table = found[0], lm.embed(torch.arange(top))
            ids = [int((table - v).abs().amax(1).argmin()) for v in one]
        else:
            ids = []
            for place in range(LENGTH):
                here = found[0][..., place, :]
                trials = [own_values(lm, [*ids, t], found)[0][..., place, :] for t in range(top)]
                gaps = [float((trial - here).abs().max()) for trial in trials]
                ids.append(min(range(top), key=gaps.__getitem__))
    assert set(ids) <= allowed
    assert len(set(ids)) > 1
    assert_starts_from(started({**spec, "init": init}, around), lm, ids)


def test_same_seed_same_start(spec: dict[str, Any], around: Surroundings) -> None:
    torch.manual_seed(1)
    first = started(spec, around, seed=5).state_dict()
    torch.manual_seed(2)
    again = started(spec, around, seed=5).state_dict()
    other = started(spec, around, seed=6).state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@torch.no_grad()
def test_state_dict_round_trip(spec: dict[str, Any], around: Surroundings) -> None:
    producer = moved(spec, around)
    expected = producer(TEXTS)
    stored = save({name: tensor.contiguous() for name, tensor in producer.state_dict().items()})
    loaded = build_producer(spec, around)  # never initialised
    assert not torch.equal(content(loaded(TEXTS)), content(expected))
    loaded.load_state_dict(load(stored))
    assert torch.equal(content(loaded(TEXTS)), content(expected))


def test_state_dict_holds_no_frozen_weights(spec: dict[str, Any], around: Surroundings) -> None:
    producer = build_producer(spec, around)
    trained = {name for name, _ in producer.named_parameters()}
    extra = sum(t.numel() for n, t in producer.state_dict().items() if n not in trained)
    assert extra <= 3 * around.lm.prefix_shape.layers  # units of keys, values, updates
    frozen = {id(p) for e in producer.encoders() for p in e.model.parameters()}
    frozen |= {id(p) for p in around.lm.model.parameters()}
    assert all(p.requires_grad and id(p) not in frozen for p in producer.parameters())


def test_gradients_reach_every_trainable_tensor(spec: dict[str, Any], around: Surroundings) -> None:
    producer = started(spec, around)
    optimizer = torch.optim.SGD(producer.parameters(), lr=1.0)
    rows = [[5, 9, 20, 33], [7, 8], [100, 101, 102], [40]]
    examples = [
        Example(t, ids, [30 + i, 4], "") for i, (t, ids) in enumerate(zip(TEXTS, rows, strict=True))
    ]
    for _ in range(2):
        optimizer.zero_grad()
        answer_losses(around.lm, producer(TEXTS), examples).mean().backward()
        gradients = {name: p.grad for name, p in producer.named_parameters()}
        optimizer.step()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        assert float(gradient.abs().max()) > 0, name


def test_its_rates_are_of_parts_that_it_has(spec: dict[str, Any], around: Surroundings) -> None:
    rates = rates_of(spec["kind"])
    assert rates is not None
    named = list(started(spec, around).named_parameters())
    groups = make_optimizer(named, OptimizerConfig(**rates)).param_groups
    assert {*rates.get("lr_for", {}).values()} <= {group["lr"] for group in groups}


@pytest.mark.parametrize("arch", ["llama"])
def test_training_lowers_the_loss(spec: dict[str, Any], around: Surroundings) -> None:
    producer = started(spec, around)
    optimizer = torch.optim.AdamW(producer.parameters(), lr=0.02)
    examples = [Example(t, [50, 60 + i], [30 + i], "") for i, t in enumerate(TEXTS)]
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = answer_losses(around.lm, producer(TEXTS), examples).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


# -- configuration -----------------------------------------------------------------------


def test_unknown_kind_suggests_the_nearest(tiny_lm: Callable[[str], FrozenLM]) -> None:
    for kind in producer_kinds():
        with pytest.raises(RecipeError, match=rf"'{kind}q' is unknown \(did you mean '{kind}'\?"):
            producer_config({"kind": f"{kind}q"})
    with pytest.raises(RecipeError, match=r"known: .*static"):
        producer_config({"kind": "zzzz"})
    with pytest.raises(RecipeError, match="kind 'None'"):
        producer_config({"kind": None, "length": 3})


@pytest.mark.parametrize("kind", producer_kinds())
@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"length": 0}, "length"),
        ({"length": "many"}, "length"),
        ({"lenght": 3}, "lenght"),
        ({"init": {"source": "text"}}, "init.text must be given"),
        ({"init": {"text": "a", "labels": ["b"]}}, "give one, or say init.source"),
        ({"init": {"source": "text", "text": " \n"}}, "init.text must be given"),
        ({"init": {"source": "labels"}}, "init.labels must be given"),
        ({"init": {"source": "random"}}, "init.source"),
        ({"init": {"top": 0}}, "init.top"),
        ({"init": {"unknown": 1}}, "init.unknown"),
        ({"generator": {"layers": 0}}, "generator"),
        ({"generator": {"width": -1}}, "generator"),
        ({"generator": {"encoder_prompt": -1}}, "generator"),
        ({"generator": {"unknown": 1}}, "generator"),
    ],
)
def test_invalid_options_are_named(kind: str, fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        producer_config({"kind": kind, **fields})
    assert where in str(caught.value)


@pytest.mark.parametrize("kind", [k for k in producer_kinds() if takes(k, "generator")])
def test_heads_must_divide_the_width(kind: str) -> None:
    with pytest.raises(ValidationError, match="width 10 is not a multiple of heads 4"):
        producer_config({"kind": kind, "generator": {"width": 10, "heads": 4}})


@pytest.mark.parametrize("kind", producer_kinds())
def test_labels_of_nothing_are_refused(kind: str) -> None:
    with pytest.raises(ValidationError, match=r"init\.labels must be given"):
        producer_config({"kind": kind, "init": {"source": "labels", "labels": ["", " "]}})


def test_cache_is_used_by_producers_without_encoder_prompt(
    around: Surroundings, own_cache: Path
) -> None:
    for kind in producer_kinds():
        if takes(kind, "generator"):
            spec = {"kind": kind, "generator": {**GENERATOR, "encoder_prompt": 2}}
            started(spec, around)(TEXTS)
            assert not list(own_cache.rglob("*.sqlite"))
            started({"kind": kind, "generator": GENERATOR}, around)(TEXTS)
            assert len(list(own_cache.rglob("*.sqlite"))) == 1
            for path in own_cache.rglob("*.sqlite*"):
                path.unlink()


@torch.no_grad()
def test_attention_is_what_the_prompt_is_written_with(
    spec: dict[str, Any], around: Surroundings
) -> None:
    """Against torch's own attention module, with pads, of what the last layer is given."""
    if "generator" not in spec:
        pytest.skip("reads no input")
    producer: Any = moved(spec, around)
    generator = producer.generator
    last = generator.layers[-1]
    given: list[Any] = []
    hooks = [
        last.register_forward_hook(lambda _, args, out: given.extend(args)),
        last.attention.out_proj.register_forward_hook(lambda _, args, out: given.append(out)),
    ]
    producer(TEXTS)
    for hook in hooks:
        hook.remove()
    read, x, memory, mask = given
    padding = ~mask
    padded = memory.new_full((*mask.shape, memory.shape[-1]), 7.0)  # what pads hold is not read
    padded[mask] = memory
    query = last.attention_norm(x)
    mixed, weights = last.attention(query, padded, padded, key_padding_mask=padding)
    torch.testing.assert_close(mixed, read, rtol=1e-4, atol=1e-5)  # it is what forward does
    found = generator.attention(TEXTS)
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(TEXTS), LENGTH))
    for row, text in enumerate(TEXTS):
        tokens = generator.tokens(text)
        assert len(tokens) == int((~padding[row]).sum())
        assert (found[row, :, len(tokens) :] == 0).all()
        assert "".join(token for token in tokens if token[0] != "<") == text
    assert float(found[0].std()) > 0, "weights that say nothing would prove nothing"
