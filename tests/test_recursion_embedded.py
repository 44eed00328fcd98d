"""Recursion on the embedded LM: what the tiny models show, on real weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from shoulders.encoders.load import load_encoder
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example, answer_losses
from shoulders.training.step import losses_of
from test_connector import plain_logits
from test_reader_recipe import write_data
from tiny_models import write_recipe

pytestmark = pytest.mark.slow

TEXTS = ["What is the opposite of hot?", "Write the number 17 in English words."]
LINK = {"kind": "connector", "layers": 1, "width": 128}
PREFIX = {"kind": "static_kv", "length": 5, "init": {"source": "text", "text": "Answer shortly."}}


@pytest.fixture(scope="module", params=["float32", "int8"])
def lm(request: pytest.FixtureRequest, embedded_lm: FrozenLM) -> FrozenLM:
    if request.param == "float32":
        return embedded_lm
    found: FrozenLM = load_lm("embedded", dtype=request.param)
    return found


def skill_of(lm: FrozenLM, *passes: dict[str, Any]) -> Skill:
    config = SkillConfig.model_validate({"passes": list(passes)})
    return Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(0))


def examples_of(skill: Skill) -> list[Example]:
    ids, answers = skill.input_ids(TEXTS), skill.answer_ids(["cold", "seventeen"])
    return [Example(t, i, a, "t") for t, i, a in zip(TEXTS, ids, answers, strict=True)]


def test_untrained_recursion_is_the_one_pass_lm(lm: FrozenLM) -> None:
    skill = skill_of(lm, {"link": LINK}, {"prompt": PREFIX})
    examples = examples_of(skill)
    with torch.no_grad():
        recursive = losses_of(skill, examples)
        assert torch.equal(recursive, answer_losses(lm, skill.prompt(TEXTS), examples))
    (one,) = skill_of(lm, {"prompt": PREFIX}).generate(TEXTS[:1], DecodingConfig(max_new_tokens=8))
    (two,) = skill.generate(TEXTS[:1], DecodingConfig(max_new_tokens=8))
    assert one[0].token_ids == two[0].token_ids


def test_generation_equals_a_loop_without_cache() -> None:
    lm = load_lm("embedded", dtype="float32")
    skill = skill_of(lm, {"prompt": PREFIX, "link": {**LINK, "skip": False}}, {"prompt": PREFIX})
    decoding = DecodingConfig(max_new_tokens=6, min_new_tokens=6)
    for text, (answer,) in zip(TEXTS, skill.generate(TEXTS, decoding), strict=True):
        (ids,) = skill.input_ids([text])
        row = list(ids)
        for _ in range(6):
            logits = plain_logits(skill, text, row)[-1]
            logits[list(lm.end_ids)] = -torch.inf
            row.append(int(logits.argmax()))
        assert answer.token_ids == row[len(ids) :]


def test_textual_rounds_and_choosers(lm: FrozenLM) -> None:
    propose = {"n": 6, "temperature": 1.3, "max_new_tokens": 12, "rounds": 2, "subset": 3}
    skill = skill_of(lm, {"prompt": PREFIX, "propose": propose}, {"prompt": PREFIX})
    together = skill.proposed(TEXTS)
    assert all(found.candidates and "Candidates: " in found.text for found in together)
    if lm.precision == "float32":
        for text, found in zip(TEXTS, together, strict=True):
            assert skill.proposed([text])[0].text == found.text


def test_a_reader_whose_second_pass_recurses(tmp_path: Path) -> None:
    """By configuration alone: train, then ask, through the command line."""
    passages, train, validation = write_data(tmp_path / "data")
    values = {
        "lm": {"name": "embedded", "dtype": "int8"},
        "reader": {
            "collection": str(passages),
            "train": [str(train)],
            "validation": [str(validation)],
            "search": {"k": 4},
            "reranker": None,
            "reading": {"pack": {"tokens": 40}, "max_new_tokens": 6},
        },
        "skill": {"passes": [{"link": LINK}, {"prompt": PREFIX}]},
        "training": {
            "steps": 4,
            "rows_per_step": 4,
            "warmup_steps": 1,
            "validate_every": 4,
            "optimizer": {"kind": "adamw", "lr": 0.01, "lr_for": {"passes.0.link": 1e-4}},
        },
    }
    recipe = write_recipe(tmp_path / "reader.yaml", values)
    reader = tmp_path / "reader"

    def shoulders(*arguments: object) -> str:
        command = [sys.executable, "-m", "shoulders", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shoulders("train", recipe, "--out", reader)
    facts = json.loads((reader / "skill.json").read_text())
    assert len(facts["skill"]["passes"]) == 2
    found = tmp_path / "answer.json"
    shoulders("ask", "on which river does oslo lie?", "--index", reader / "index",
              "--skill", reader, "--json", found)  # fmt: skip
    assert json.loads(found.read_text())["ctxs"]
