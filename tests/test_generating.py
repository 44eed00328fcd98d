"""Answers in batches: a prompt that never changes is read once, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig, generate
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import SkillConfig
from shoulders.skills.generating import generated
from shoulders.skills.skill import Skill

TEXTS = [f"the {'small ' * (i % 5)}cat {i}" for i in range(12)]
STATIC = {"kind": "static", "length": 4}
LOWRANK = {"kind": "static_lowrank", "length": 3, "rank": 2}
GREEDY = DecodingConfig(max_new_tokens=5)


def skill_of(lm: FrozenLM, prompt: dict[str, Any]) -> Skill:
    config = SkillConfig.model_validate({"passes": [{"prompt": prompt}]})
    return Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prompt", [STATIC, LOWRANK], ids=["vectors", "updates"])
def test_constant_prompts_change_no_bit(lm: FrozenLM, prompt: dict[str, Any]) -> None:
    skill = skill_of(lm, prompt)
    ids = skill.asking_ids(TEXTS, GREEDY)
    found = generated(skill, TEXTS, ids, GREEDY, most=3)
    with torch.no_grad():
        alone = [
            generate(lm, skill.prompt([t]), [i], GREEDY) for t, i in zip(TEXTS, ids, strict=True)
        ]
    for several, ((one,),) in zip(found, alone, strict=True):
        assert several[0].token_ids == one.token_ids
        assert several[0].logprob == pytest.approx(one.logprob, abs=1e-4)


def test_a_constant_prompt_is_read_once(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm: FrozenLM = tiny_lm("llama")
    assert lm.blocks is not None
    skill = skill_of(lm, STATIC)
    ids = skill.asking_ids(TEXTS, GREEDY)
    read: list[int] = []
    reads = lm.blocks.read

    def counted(x: torch.Tensor, counts: Sequence[int], *rest: Any) -> torch.Tensor:
        read.extend(counts)
        return reads(x, counts, *rest)

    monkeypatch.setattr(lm.blocks, "read", counted)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)  # streams would read it each
    generated(skill, TEXTS, ids, GREEDY, most=3)
    asked = sum(len(own) for own in ids)
    answers = sum(1 for count in read if count == 1)
    assert sum(read) == STATIC["length"] + asked + answers
