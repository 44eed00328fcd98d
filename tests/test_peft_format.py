"""Static prompts exchanged with PEFT: the same logits in both libraries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoulders.encoders.load import load_encoder
from shoulders.errors import ArtefactError
from shoulders.lm.combine import combine
from shoulders.lm.load import load_lm
from shoulders.skills.config import PassConfig, SkillConfig
from shoulders.skills.peft_format import export_to_peft, import_from_peft
from shoulders.skills.skill import Skill
from tiny_models import save_tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_lm(tmp_path_factory.mktemp("lm"))


def _skill(folder: Path, kind: str = "static") -> Skill:
    lm = load_lm(str(folder), dtype="float32")
    config = SkillConfig(passes=(PassConfig(prompt={"kind": kind, "length": 4}),))
    return Skill.create(lm, config, load_encoder, torch.Generator().manual_seed(1))


def _logits(skill: Skill, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        batch = combine(skill.lm, skill.prompt(["x"]), [ids])
        hidden = skill.lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
        return skill.lm.logits(hidden[0])


def test_peft_computes_the_same_logits_from_an_exported_prompt(
    folder: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    skill = _skill(folder)
    export_to_peft(skill, tmp_path / "adapter")
    ours = _logits(skill, [5, 6, 7])
    model = peft.PeftModel.from_pretrained(
        load_lm(str(folder), dtype="float32").model, tmp_path / "adapter"
    )
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([[5, 6, 7]])).logits[0]
    assert ours.std() > 0.01
    torch.testing.assert_close(theirs[-len(ours) :], ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "config", "said"),
    [
        (torch.ones(2, 3), "[]", "holds no object"),
        (torch.ones(0, 16), '{"peft_type": "PROMPT_TUNING"}', "is empty, or holds NaN"),
        (torch.full((2, 16), torch.nan), '{"peft_type": "PROMPT_TUNING"}', "is empty, or holds"),
    ],
)
def test_what_is_no_prompt_is_refused(
    prompt: torch.Tensor, config: str, said: str, folder: Path, tmp_path: Path
) -> None:
    lm = load_lm(str(folder), dtype="float32")
    vectors = prompt.new_empty(len(prompt), lm.hidden_size).copy_(prompt[:, :1])
    save_file({"prompt_embeddings": vectors}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ArtefactError, match=said):
        import_from_peft(tmp_path, lm)


def test_an_exported_prompt_comes_back_the_same(folder: Path, tmp_path: Path) -> None:
    skill = _skill(folder)
    export_to_peft(skill, tmp_path / "adapter")
    back = import_from_peft(tmp_path / "adapter", skill.lm, skill.config.format)
    torch.testing.assert_close(_logits(back, [3, 9]), _logits(skill, [3, 9]), atol=1e-5, rtol=0)


def test_other_producers_and_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="only a static prompt of vectors"):
        export_to_peft(_skill(folder, "static_kv"), tmp_path / "a")
    with pytest.raises(ArtefactError, match="not a PEFT PromptTuning adapter"):
        import_from_peft(tmp_path / "missing", _skill(folder).lm)
    export_to_peft(_skill(folder), tmp_path / "b")
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ArtefactError, match="LORA"):
        import_from_peft(tmp_path / "b", _skill(folder).lm)
