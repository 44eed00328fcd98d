"""One step's gradients: however its rows are split, and however many packs run at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shoulders.data.batching import balanced
from shoulders.encoders.load import load_encoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.streams import Streams
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training import step
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.objective import Example
from shoulders.training.step import split
from tiny_models import prompt_spec, save_tiny_encoder

ROWS = [[5, 6, 7, 8, 9], [10], [11, 12, 13], [5, 6], [9, 9, 9, 9, 9, 9, 9], [4, 3]]
CONFIG = TrainingConfig(steps=1, optimizer=OptimizerConfig(lr=0.1))


def skill_of(lm: FrozenLM, kind: str, folder: Path) -> Skill:
    encoder = save_tiny_encoder(folder / "encoder")
    config = SkillConfig(passes=(PassConfig(prompt=prompt_spec(kind, encoder)),))
    random = torch.Generator().manual_seed(0)
    return Skill.create(lm, config, functools.cache(load_encoder), random)


def examples() -> list[Example]:
    return [Example(f"text {i}", ids, [20 + i, 0], "t") for i, ids in enumerate(ROWS)]


def gradients(skill: Skill, count: int, most: int = 1024) -> tuple[float, list[Tensor]]:
    config = CONFIG.model_copy(update={"micro_tokens": most})
    with Streams(count) as passes:
        loss = step.gradients(skill, examples(), config, passes)
    assert skill.producer is not None
    return loss, [p.grad.clone() for p in skill.producer.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", ["static", "static_kv", "idpt", "idpt_kv"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_gradients_do_not_depend_on_the_split(
    arch: str,
    kind: str,
    tiny_lm: Callable[[str], FrozenLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    skill = skill_of(tiny_lm(arch), kind, tmp_path)
    loss, expected = gradients(skill, 1)
    assert loss > 0
    assert any(bool(g.any()) for g in expected)
    for count, most in ((1, 16), (2, 1024), (3, 16)):
        other, found = gradients(skill, count, most)
        assert other == pytest.approx(loss, rel=1e-5)
        for mine, theirs in zip(found, expected, strict=True):
            largest = max(1e-3, float(theirs.abs().max()))
            assert float((mine - theirs).abs().max()) <= 1e-4 * largest


def test_streams_give_the_same_bits_every_time(
    tiny_lm: Callable[[str], FrozenLM], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    skill = skill_of(tiny_lm("llama"), "idpt_kv", tmp_path)
    loss, expected = gradients(skill, 3, 16)
    for _ in range(5):
        again, found = gradients(skill, 3, 16)
        assert again == loss
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_threads_are_given_back(tiny_lm: Callable[[str], FrozenLM], tmp_path: Path) -> None:
    skill = skill_of(tiny_lm("llama"), "static", tmp_path)
    before = torch.get_num_threads()
    gradients(skill, 2)
    assert torch.get_num_threads() == before


def test_every_row_is_in_one_pack(tiny_lm: Callable[[str], FrozenLM], tmp_path: Path) -> None:
    for arch in ("llama", "gpt2"):
        skill = skill_of(tiny_lm(arch), "static", tmp_path)
        packs = split(skill, examples(), 16, 2)
        assert sorted(i for pack in packs for i in pack) == list(range(len(ROWS)))
        assert len(packs) > 1


def test_balanced_packs() -> None:
    assert balanced([], 10) == []
    assert balanced([50], 10, 4) == [[0]]
    assert balanced([1, 2, 3], 100) == [[0, 1, 2]]
    packs = balanced([9, 1, 8, 2, 7, 3, 6, 4], 1000, 2)
    assert [sum([9, 1, 8, 2, 7, 3, 6, 4][i] for i in pack) for pack in packs] == [20, 20]
    assert len(balanced([10] * 9, 30, 2)) == 4, "three would do, but two are to run at once"
    with pytest.raises(ValueError, match="at least 1"):
        balanced([1], 0)
