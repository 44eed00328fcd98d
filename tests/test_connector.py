"""Neural recursion: LM -> link -> LM, against slow references without caches or batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.data.templates import Templates
from shoulders.errors import RecipeError, ShouldersError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.recursion.first_pass import FirstPass
from shoulders.skills.artefact import load_skill, save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example, answer_losses
from shoulders.training.step import losses_of
from tiny_models import save_tiny_lm

TEXTS = ["the capital of france", "two", "write the number three as a word please"]
STATIC = {"kind": "static", "length": 3}
PREFIX = {"kind": "static_kv", "length": 2}
CONNECTOR = {"kind": "connector", "layers": 2, "heads": 2}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"link": CONNECTOR}, {}],
    "prompted": [{"prompt": STATIC, "link": CONNECTOR}, {"prompt": PREFIX}],
    "paper": [{"link": {**CONNECTOR, "skip": False}}, {"prompt": STATIC}],
    "three passes": [{"link": CONNECTOR}, {"prompt": PREFIX, "link": "same"}, {"prompt": STATIC}],
    "mix": [{"link": {**CONNECTOR, "reads": [0, 1]}}, {}],
    "before the norm": [{"link": {**CONNECTOR, "reads": "before_norm", "width": 16}}, {}],
    "latent": [{"link": {"kind": "latent"}}, {"prompt": STATIC}],
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    found: FrozenLM = load_lm(
        str(save_tiny_lm(tmp_path_factory.mktemp("lm") / "lm")), dtype="float32"
    )
    return found


@pytest.fixture(scope="module")
def plain_lm(lm: FrozenLM) -> FrozenLM:
    """The same LM through the Hugging Face modules."""
    found: FrozenLM = load_lm(lm.name, dtype="float32")
    found.blocks = None
    return found


def no_encoder(name: str) -> Any:
    raise AssertionError(name)


def skill_of(lm: FrozenLM, chain: str, *, shaken: bool = True) -> Skill:
    """Return a skill; `shaken` moves every trained value from where it starts."""
    random = torch.Generator().manual_seed(0)
    config = SkillConfig.model_validate({"passes": CHAINS[chain]})
    skill = Skill.create(lm, config, no_encoder, random)
    if shaken and skill.trained is not None:
        with torch.no_grad():
            for parameter in skill.trained.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    if skill.trained is not None:
        skill.trained.train(False)
    return skill


@torch.no_grad()
def plain_logits(skill: Skill, text: str, ids: list[int]) -> torch.Tensor:
    """Return the logits of every position: one row, whole passes of the LM's own forward."""
    lm = skill.lm
    tokens = lm.model.get_input_embeddings()(torch.tensor([ids]))
    current = tokens
    for earlier in skill.parts.earlier:
        prompt = earlier.producer([text]) if earlier.producer else Prompt.empty(1)
        states = plain_pass(lm, prompt, current)
        taps = earlier.link.taps
        wanted = torch.stack([states[i] for i in taps]) if taps else states[-1]
        current = earlier.link(wanted, tokens)
    return lm.model.lm_head(plain_pass(lm, skill.prompt([text]), current)[-1][0])


def plain_pass(lm: FrozenLM, prompt: Prompt, embedded: torch.Tensor) -> list[torch.Tensor]:
    """Return the states before every layer, after the last one, and after the norm."""
    from transformers import DynamicCache

    q, p = prompt.keys_values.shape[4], prompt.vectors.shape[1]
    cache = DynamicCache()
    for layer in range(lm.layers if q else 0):
        cache.update(prompt.keys_values[:, layer, 0], prompt.keys_values[:, layer, 1], layer)
    x = torch.cat([prompt.vectors, embedded], 1) if p else embedded
    kept: list[torch.Tensor] = []
    body = lm.model.base_model
    hooks = [
        layer.register_forward_hook(
            lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o)
        )
        for layer in body.layers
    ]
    positions = torch.arange(q, q + x.shape[1])[None]
    out = body(
        inputs_embeds=x,
        attention_mask=torch.ones(1, q + x.shape[1], dtype=torch.long),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    for hook in hooks:
        hook.remove()
    return [s[:, p:] for s in (x, *kept, out.last_hidden_state)]


def examples_of(skill: Skill, texts: list[str] = TEXTS) -> list[Example]:
    answers = skill.answer_ids(["paris", "two words here", "x"])
    ids = skill.input_ids(texts)
    return [Example(t, i, a, "t") for t, i, a in zip(texts, ids, answers, strict=False)]


@pytest.mark.parametrize("chain", CHAINS)
def test_losses_equal_plain_passes(lm: FrozenLM, chain: str) -> None:
    skill = skill_of(lm, chain)
    examples = examples_of(skill)
    with torch.no_grad():
        found = losses_of(skill, examples).split([len(e.answer_ids) for e in examples])
    for example, losses in zip(examples, found, strict=True):
        logits = plain_logits(skill, example.text, example.read_ids)
        logprobs = torch.log_softmax(logits[len(example.input_ids) - 1 :], -1)
        wanted = -logprobs.gather(1, torch.tensor(example.answer_ids)[:, None])[:, 0]
        torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chain", [c for c in CHAINS if c != "before the norm"])
def test_any_lm_computes_what_fused_layers_do(lm: FrozenLM, plain_lm: FrozenLM, chain: str) -> None:
    fused, other = skill_of(lm, chain), skill_of(plain_lm, chain)
    with torch.no_grad():
        torch.testing.assert_close(
            losses_of(fused, examples_of(fused)), losses_of(other, examples_of(other)),
            atol=1e-4, rtol=0,
        )  # fmt: skip
    decoding = DecodingConfig(max_new_tokens=5)
    ours, theirs = fused.generate(TEXTS, decoding), other.generate(TEXTS, decoding)
    assert [c[0].token_ids for c in ours] == [c[0].token_ids for c in theirs]


@pytest.mark.parametrize("chain", CHAINS)
def test_greedy_generation_equals_a_loop_without_cache(lm: FrozenLM, chain: str) -> None:
    skill = skill_of(lm, chain)
    new = 7
    decoding = DecodingConfig(max_new_tokens=new, min_new_tokens=new)
    answers = skill.generate(TEXTS, decoding)
    for text, ids, (answer,) in zip(TEXTS, skill.input_ids(TEXTS), answers, strict=True):
        row = list(ids)
        for _ in range(new):
            logits = plain_logits(skill, text, row)[-1]
            logits[list(lm.end_ids)] = -torch.inf
            row.append(int(logits.argmax()))
        assert answer.token_ids == row[len(ids) :]
        streamed = [d.completion for d in skill.stream(text, decoding) if d.completion]
        assert streamed[0].token_ids == answer.token_ids


def test_samples_share_a_prefill_and_rows_leave(lm: FrozenLM) -> None:
    skill = skill_of(lm, "three passes")
    decoding = DecodingConfig(max_new_tokens=9, temperature=1.5, n=3, stop=("a", "e"))
    together = skill.generate(TEXTS, decoding)
    for text, several in zip(TEXTS, together, strict=True):
        (alone,) = skill.generate([text], decoding)
        assert [c.token_ids for c in alone] == [c.token_ids for c in several]
    assert len({len(c.token_ids) for several in together for c in several}) > 1, "none left early"


@pytest.mark.parametrize("chain", ["plain", "three passes", "mix"])
def test_untrained_recursion_is_the_one_pass_lm(lm: FrozenLM, chain: str) -> None:
    """Exactly: the Connector adds nothing but zeros."""
    skill = skill_of(lm, chain, shaken=False)
    ids = skill.input_ids(TEXTS)
    assert torch.equal(skill.embedded(TEXTS, ids), lm.embed_rows(ids))
    examples = examples_of(skill)
    with torch.no_grad():
        recursive = losses_of(skill, examples)
        plain = answer_losses(lm, skill.prompt(TEXTS), examples)
    assert torch.equal(recursive, plain)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_row_does_not_depend_on_its_batch(lm: FrozenLM, chain: str) -> None:
    skill = skill_of(lm, chain)
    examples = examples_of(skill)
    with torch.no_grad():
        together = losses_of(skill, examples).split([len(e.answer_ids) for e in examples])
        for example, losses in zip(examples, together, strict=True):
            torch.testing.assert_close(losses_of(skill, [example]), losses, atol=1e-4, rtol=0)


def test_likelihood_of_candidates(lm: FrozenLM) -> None:
    skill = skill_of(lm, "prompted")
    answers = [["paris", "madrid now"], ["two"], ["a", "b", "c d"]]
    found = skill.score(TEXTS, answers)
    for text, several, scores in zip(TEXTS, answers, found, strict=True):
        for answer, score in zip(several, scores, strict=True):
            (ids,), (wanted,) = skill.input_ids([text]), skill.answer_ids([answer])
            logits = plain_logits(skill, text, ids + wanted[:-1])[len(ids) - 1 :]
            logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(wanted)[:, None])
            assert score.logprob == pytest.approx(float(logprobs.sum()), abs=1e-3)
            assert score.tokens == len(wanted)


def test_gradients_reach_every_part(lm: FrozenLM) -> None:
    """And are those of the plain passes, by finite differences along a random direction."""
    skill = skill_of(lm, "prompted")
    assert skill.trained is not None
    examples = examples_of(skill)
    losses_of(skill, examples).mean().backward()
    random = torch.Generator().manual_seed(1)
    named = dict(skill.trained.named_parameters())
    assert {n.split(".")[2] for n in named} == {"prompt", "link"}
    for name, parameter in named.items():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=random)
        direction /= direction.norm()
        values = []
        for step in (1e-3, -1e-3):
            with torch.no_grad():
                parameter += step * direction
                values.append(float(losses_of(skill, examples).double().mean()))
                parameter -= step * direction
        slope = (values[0] - values[1]) / 2e-3
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, abs=2e-3), name
        parameter.grad = None


@pytest.mark.parametrize("chain", ["plain", "mix", "latent"])
def test_remembered_first_pass(lm: FrozenLM, chain: str, tmp_path: Path) -> None:
    skill = skill_of(lm, chain)
    first = FirstPass(lm, skill.parts.earlier[0].link.taps, tmp_path)
    kept = skill.remembering(first)
    examples = examples_of(skill)
    with torch.no_grad():
        fresh = losses_of(kept, examples)
        assert first.read == len(examples)
        assert torch.equal(losses_of(kept, examples), fresh), "a kept value is the fresh one"
        assert first.read == len(examples), "the LM has read rows again"
        torch.testing.assert_close(losses_of(skill, examples), fresh, atol=1e-4, rtol=0)
    first.close()
    again = FirstPass(lm, skill.parts.earlier[0].link.taps, tmp_path)
    with torch.no_grad():
        assert torch.equal(losses_of(skill.remembering(again), examples), fresh)
    assert again.read == 0
    with pytest.raises(ShouldersError, match="without a prompt"):
        skill_of(lm, "prompted").remembering(first)


@pytest.mark.parametrize("chain", CHAINS)
def test_round_trip(lm: FrozenLM, chain: str, tmp_path: Path) -> None:
    skill = skill_of(lm, chain)
    save_skill(skill, tmp_path / "skill", Templates(), {})
    loaded, _ = load_skill(tmp_path / "skill", lm, no_encoder)
    with torch.no_grad():
        assert torch.equal(
            losses_of(loaded, examples_of(loaded)), losses_of(skill, examples_of(skill))
        )
    assert loaded.trained_parameters == skill.trained_parameters


BAD: list[tuple[dict[str, Any], str]] = [
    ({"link": {**CONNECTOR, "width": 30, "heads": 4}}, "width 30 does not split into 4 heads"),
    ({"link": {**CONNECTOR, "reads": [0, 9]}}, "has layers 0 to 2, not 9"),
]


@pytest.mark.parametrize(("one", "message"), BAD)
def test_links_that_do_not_fit_are_refused(lm: FrozenLM, one: dict[str, Any], message: str) -> None:
    config = SkillConfig.model_validate({"passes": [one, {}]})
    with pytest.raises(RecipeError, match=message):
        Skill.create(lm, config, no_encoder)


def test_last_layer_before_the_norm_needs_fused_layers(plain_lm: FrozenLM) -> None:
    config = SkillConfig.model_validate({"passes": CHAINS["before the norm"]})
    with pytest.raises(RecipeError, match="only after the final norm"):
        Skill.create(plain_lm, config, no_encoder)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{}, {}], "give it either a link"),
        ([{"link": CONNECTOR, "propose": {}}, {}], "give it either a link"),
        ([{"link": CONNECTOR}], "is the last"),
        ([{"link": "same"}, {}], "same as which"),
        ([{"link": {"layers": 0}}, {}], "greater than or equal to 1"),
        ([{"link": {"kind": "conector"}}, {}], "conector"),
        ([{"link": {"reads": []}}, {}], "one layer or more"),
        ([{"propose": {"n": 0}}, {}], "greater than or equal to 1"),
        ([{"propose": {"n": 4, "temperature": 0}}, {}], "all samples would be the same"),
    ],
)
def test_passes_that_cannot_be_are_refused(passes: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkillConfig.model_validate({"passes": passes})


def test_connector_of_another_width_is_refused(lm: FrozenLM, tmp_path: Path) -> None:
    """Edited by hand: the tensors no longer fit what the file says."""
    import json

    skill = skill_of(lm, "plain")
    save_skill(skill, tmp_path / "skill", Templates(), {})
    file = tmp_path / "skill" / "skill.json"
    values = json.loads(file.read_text())
    values["skill"]["passes"][0]["link"]["width"] = 64
    file.write_text(json.dumps(values))
    with pytest.raises(ShouldersError, match=r"does not fit skill\.json.*size mismatch"):
        load_skill(tmp_path / "skill", lm, no_encoder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_ends_where_the_longest_pass_does(
    kind: str, tiny_lm: Callable[[str], FrozenLM]
) -> None:
    """An earlier pass with the longer prompt reaches the window before the last one does."""
    lm = tiny_lm(kind)
    prompt = {"kind": "static", "length": 20}
    config = SkillConfig.model_validate({"passes": [{"prompt": prompt, "link": {"heads": 2}}, {}]})
    skill = Skill.create(lm, config, no_encoder)
    text = "two"
    room = lm.max_positions - 20 - len(skill.input_ids([text])[0])
    decoding = DecodingConfig(max_new_tokens=10_000, min_new_tokens=10_000)
    (found,) = skill.generate([text], decoding)[0]
    # One token more than there is room for is written, but never read.
    assert (len(found.token_ids), found.finish) == (room + 1, "length")
