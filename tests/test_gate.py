"""The gate of recursive skills: who answers at once, who recurses, and what it is fitted to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from shoulders.cli.app import app
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import ShouldersError
from shoulders.lm.decode import Completion, DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.reader.calibration import Platt
from shoulders.skills.artefact import read_artefact, save_skill
from shoulders.skills.config import SkillConfig
from shoulders.skills.gate import Gated, confidence, direct, fitted_gate
from shoulders.skills.skill import Skill
from shoulders.training.gate import gate_of
from tiny_models import save_tiny_lm

TEXTS = ["the capital of france", "two", "write the number three", "answer please", "is a word"]
STATIC = {"kind": "static", "length": 3}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "textual": [
        {"prompt": STATIC, "propose": {"n": 3, "temperature": 1.5, "max_new_tokens": 5}},
        {"prompt": {"kind": "static_kv", "length": 2}},
    ],
    "neural": [{"link": {"heads": 2, "skip": False}}, {"prompt": STATIC}],
}
DECODING = DecodingConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    found: FrozenLM = load_lm(
        str(save_tiny_lm(tmp_path_factory.mktemp("lm") / "lm")), dtype="float32"
    )
    return found


def skill_of(lm: FrozenLM, chain: str) -> Skill:
    def no_encoder(name: str) -> Any:
        raise AssertionError(name)

    config = SkillConfig.model_validate({"passes": CHAINS[chain]})
    return Skill.create(lm, config, no_encoder, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("chain", CHAINS)
def test_the_unsure_recurse_and_the_others_do_not(lm: FrozenLM, chain: str) -> None:
    skill = skill_of(lm, chain)
    first = direct(skill).generate(TEXTS, DECODING)
    whole = skill.generate(TEXTS, DECODING)
    assert [c[0].token_ids for c in first] != [c[0].token_ids for c in whole], (
        "both ways answer alike: nothing is tested"
    )
    gate = Platt(slope=2.0, bias=3.0)
    sure = [gate.probability(confidence(several[0])) for several in first]
    for least in (0.0, sorted(sure)[2], 1.0):
        gated = Gated(skill, gate, least)
        wanted = [
            one if p >= least and least < 1 else both
            for one, both, p in zip(first, whole, sure, strict=True)
        ]
        found = gated.generate(TEXTS, DECODING)
        assert [c[0].token_ids for c in found] == [c[0].token_ids for c in wanted]
        assert gated.answered == len(TEXTS)
        assert gated.recursed == {0.0: 0, 1.0: len(TEXTS)}.get(least, 2)


def test_a_row_does_not_depend_on_its_batch(lm: FrozenLM) -> None:
    gated = Gated(skill_of(lm, "textual"), Platt(slope=2.0, bias=3.0), 0.5)
    together = gated.generate(TEXTS, DECODING)
    alone = [gated.generate([text], DECODING)[0] for text in TEXTS]
    assert [c[0].token_ids for c in alone] == [c[0].token_ids for c in together]


def test_one_pass_has_nothing_to_decide(lm: FrozenLM) -> None:
    with pytest.raises(ShouldersError, match="one pass"):
        direct(Skill.base(lm))
    assert gate_of(Skill.base(lm), [(Row("t", "a", ("b",)), "a")]) is None


def test_fit() -> None:
    completions = [Completion("", [1, 2], -0.1 * i, "stop") for i in range(40)]
    right = [i < 20 or i % 7 == 0 for i in range(40)]
    gate = fitted_gate(completions, right)
    assert gate is not None
    probabilities = [gate.probability(confidence(c)) for c in completions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(sum(right), abs=1.5)
    assert fitted_gate(completions, [False] * 40) is None


def test_artefact_and_command_line(lm: FrozenLM, tmp_path: Path) -> None:
    skill = skill_of(lm, "neural")
    gate = Platt(slope=2.0, bias=3.0)
    save_skill(skill, tmp_path / "gated", Templates(), {}, gate)
    save_skill(skill, tmp_path / "plain", Templates(), {})
    assert read_artefact(tmp_path / "gated").gate == gate
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"input": "{t}", "targets": ["x"]}}\n' for t in TEXTS))

    def run(name: str, *options: str) -> Any:
        arguments = ["eval", str(tmp_path / name), "--data", str(rows), *options]
        return CliRunner().invoke(app, [*arguments, "--json", str(tmp_path / "found.json")])

    for least, share in (("0", 0.0), ("1", 1.0)):
        done = run("gated", "--recurse-below", least)
        assert done.exit_code == 0, done.output
        assert f'"recursed": {share}' in (tmp_path / "found.json").read_text()
    refused = run("plain", "--recurse-below", "0.5")
    assert refused.exit_code != 0
    assert "no calibrated gate" in str(refused.output) + str(refused.exception)
