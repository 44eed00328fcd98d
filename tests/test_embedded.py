"""Every producer on the embedded LM with the embedded encoder: promises 2 to 5 on real weights."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.prompts.build import producer_kinds
from shoulders.skills.artefact import load_skill, save_skill
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example, answer_losses

pytestmark = pytest.mark.slow

encoder = functools.cache(load_encoder)
INPUTS = ("What is the opposite of hot?", "Write 21 in words.", "Capital of the country Spain?")
ANSWERS = ("cold", "twenty-one", "Madrid")


@pytest.fixture(scope="module", params=producer_kinds())
def skill(request: pytest.FixtureRequest, embedded_lm: FrozenLM) -> Skill:
    init = {"source": "text", "text": "Give only the short answer."}
    prompt = {"kind": request.param, "length": 4, "init": init}
    config = SkillConfig(passes=(PassConfig(prompt=prompt),))
    made = Skill.create(embedded_lm, config, encoder, torch.Generator().manual_seed(0))
    assert made.producer is not None
    with torch.no_grad():  # a zero-initialised projection would hide what depends on the input
        for name, parameter in made.producer.named_parameters():
            if name.startswith("project"):
                parameter.normal_(std=0.002, generator=torch.Generator().manual_seed(1))
    return made


@torch.no_grad()
def plain_logits(lm: FrozenLM, prompt: Prompt, ids: list[int]) -> Tensor:
    """Return the logits `[s, vocabulary]` at the tokens of one row, alone and without padding."""
    embeddings = lm.model.get_input_embeddings()(torch.tensor([ids]))
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prompt.keys_values[0]):
        cache.update(keys[None], values[None], layer)
    if prompt.vectors.shape[1]:
        embeddings = torch.cat([prompt.vectors, embeddings], 1)
    output = lm.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0, -len(ids) :]
    return logits


def test_only_answer_tokens_count_and_as_the_plain_model_says(skill: Skill) -> None:
    examples = [
        Example(text, ids, answer, "t")
        for text, ids, answer in zip(
            INPUTS, skill.input_ids(INPUTS), skill.answer_ids(ANSWERS), strict=True
        )
    ]
    with torch.no_grad():
        found = answer_losses(skill.lm, skill.prompt(INPUTS), examples)
    expected = []
    for example in examples:
        ids = example.input_ids + example.answer_ids
        with torch.no_grad():
            logits = plain_logits(skill.lm, skill.prompt([example.text]), ids)
        at = slice(len(example.input_ids) - 1, len(ids) - 1)
        targets = torch.tensor(example.answer_ids)
        expected.append(torch.nn.functional.cross_entropy(logits[at], targets, reduction="none"))
    assert len(found) == sum(len(e.answer_ids) for e in examples)
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=0)


def test_prompts_depend_on_the_input_alone(skill: Skill) -> None:
    together = skill.prompt(INPUTS)
    for row, text in enumerate(INPUTS):
        alone = skill.prompt([text])
        both = ((together.vectors, alone.vectors), (together.keys_values, alone.keys_values))
        for batched, single in both:
            torch.testing.assert_close(batched[row : row + 1], single, atol=1e-5, rtol=1e-5)


def test_cached_answers_equal_a_loop_without_a_cache(skill: Skill) -> None:
    found = skill.generate(INPUTS, DecodingConfig(max_new_tokens=6))
    for text, ids, several in zip(INPUTS, skill.input_ids(INPUTS), found, strict=True):
        with torch.no_grad():
            prompt = skill.prompt([text])
        new: list[int] = []
        while len(new) < 6 and not (new and new[-1] in skill.lm.end_ids):
            new.append(int(plain_logits(skill.lm, prompt, ids + new)[-1].argmax()))
        assert several[0].token_ids == new


def test_a_saved_skill_answers_the_same(skill: Skill, tmp_path: Path) -> None:
    save_skill(skill, tmp_path / "skill", Templates(), {})
    loaded, _ = load_skill(tmp_path / "skill", skill.lm, encoder)
    for ours, theirs in zip(
        skill.score(INPUTS, [ANSWERS] * 3), loaded.score(INPUTS, [ANSWERS] * 3), strict=True
    ):
        assert ours == theirs


@pytest.fixture(scope="module")
def int8_lm(embedded_lm: FrozenLM) -> FrozenLM:
    lm = load_lm("embedded", dtype="int8")
    assert lm.fingerprint == embedded_lm.fingerprint
    return lm


def test_a_saved_skill_means_the_same_in_int8(
    skill: Skill, int8_lm: FrozenLM, tmp_path: Path
) -> None:
    """Keys and values included: rounding apart, answers are as likely."""
    save_skill(skill, tmp_path / "skill", Templates(), {})
    loaded, _ = load_skill(tmp_path / "skill", int8_lm, encoder)
    given = INPUTS, [ANSWERS] * 3
    pairs = zip(skill.score(*given), loaded.score(*given), strict=True)
    differences = [
        a.logprob - b.logprob for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)
    ]
    # 0.3 to 0.5; 5.5 when values had been rescaled for better rounding.
    assert sum(abs(d) for d in differences) / len(differences) < 1.0
