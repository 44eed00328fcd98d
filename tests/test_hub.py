"""Skills on the Hub: what is taken, and what is said where it cannot be had."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

import shoulders
from shoulders.cli.serve import _named
from shoulders.errors import ArtefactError
from shoulders.skills.hub import local
from tiny_models import save_tiny_lm


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The Hub with one skill; returns what it is asked."""
    lm = shoulders.load_lm(save_tiny_lm(tmp_path / "lm"), dtype="float32")
    config = {"passes": [{"prompt": {"kind": "static", "length": 2}}]}
    skill = shoulders.Skill.create(
        lm, shoulders.SkillConfig.model_validate(config), shoulders.load_encoder
    )
    shoulders.save_skill(skill, tmp_path / "snapshot", shoulders.Templates(), {})
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        patterns = options["allow_patterns"], options["ignore_patterns"]
        asked.append((repo, options["revision"], patterns))
        if repo != "me/capitals":
            raise OSError("404: no such repository\nwith a second line")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_skill_comes_from_the_hub(hub: list[Any], tmp_path: Path) -> None:
    lm = shoulders.load_lm(tmp_path / "lm", dtype="float32")
    skill, _ = shoulders.load("hf://me/capitals@v1", lm)
    assert skill.generate(["two"])
    ((repo, revision, patterns),) = hub
    assert (repo, revision) == ("me/capitals", "v1")
    names = [
        *("skill.json", "skill.safetensors", "member-1/skill.safetensors", "notes.txt"),
        *("checkpoints/step-0000300/state.safetensors", "member-1/checkpoints/step-1/state.json"),
        *("index/index.json", "contexts/train.json", "folds/without-1/skill.json"),
        *("candidates/0a.json", "parts/first/skill.json", "second/train.json", "second/skill.json"),
    ]
    allowed, ignored = patterns
    taken = filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored)
    assert list(taken) == names[:3]
    # What README uploads is no row and no document either.
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in readme.splitlines() if "hf upload" in line)
    patterns = re.findall('--include "([^"]+)"', line)
    own = ["skill.json", "skill.safetensors", "member-1/skill.json", "README.md"]
    own += [
        "ensemble.json",
        "reader.json",
        "fusion.json",
        "reranker/reranker.json",
        "reranker/model.safetensors",
    ]
    rows = ["log.jsonl", "contexts/train.jsonl", "index/passages.json", "second/train.jsonl"]
    rows += ["candidates/0a.json", "folds/without-1.jsonl", "checkpoints/step-1/state.safetensors"]
    sent = filter_repo_objects(own + rows, allow_patterns=patterns)
    assert list(sent) == own
    assert _named(["hf://me/capitals", "geo=hf://me/capitals@v1"]) == {
        "capitals": tmp_path / "snapshot",
        "geo": tmp_path / "snapshot",
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf://me/other", "hf://me/other: cannot be had from the Hub: 404: no such repository$"),
        ("hf://capitals", "use hf://USER/SKILL"),
        ("hf://me/../x/y", "use hf://USER/SKILL"),
    ],
)
def test_what_cannot_be_had_says_so(hub: list[Any], name: str, said: str) -> None:
    with pytest.raises(ArtefactError, match=said):
        local(name)


def test_folders_are_never_looked_up(hub: list[Any]) -> None:
    assert local("me/capitals") == "me/capitals"
    assert local("base") == "base"
    assert hub == []
