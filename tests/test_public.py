"""The package's own face: names that programs import from `shoulders` itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console

import shoulders
from shoulders import errors
from shoulders.comparison import run as comparison_run
from shoulders.comparison.plan import make_plan
from shoulders.demo import run as demo_run
from shoulders.training import run as training_run
from tiny_models import recipe_values, save_tiny_lm, write_recipe

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", shoulders.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(shoulders, name).__doc__
    assert name in dir(shoulders)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(shoulders.__file__).read_text(encoding="utf-8"))
    seen = {
        (alias.asname, node.module.removeprefix("shoulders."))
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == set(shoulders._HOMES.items())


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_ml'"):
        shoulders.load_ml  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    script = "import sys, shoulders; print('torch' in sys.modules, shoulders.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"False {shoulders.__version__}\n"


def test_texts_come_in_lists(tmp_path: Path) -> None:
    lm = shoulders.load_lm(str(save_tiny_lm(tmp_path / "lm")), dtype="float32")
    skill, decoding = shoulders.Skill.base(lm), shoulders.DecodingConfig(max_new_tokens=2)
    assert skill.generate([], decoding) == []
    assert skill.score([], []) == []
    with pytest.raises(shoulders.ShouldersError, match="give a list of texts"):
        skill.generate("hi there", decoding)
    with pytest.raises(shoulders.ShouldersError, match="2 texts and candidates for 1"):
        skill.score(["hi", "you"], [["a"]])


def test_paths_may_be_texts(tmp_path: Path) -> None:
    values = recipe_values(save_tiny_lm(tmp_path / "lm"), tmp_path / "data")
    recipe = shoulders.read_recipe(str(write_recipe(tmp_path / "recipe.yaml", values)))
    skill = shoulders.train(recipe, str(tmp_path / "out"))
    again, templates = shoulders.load(str(tmp_path / "out"), skill.lm)
    rows = shoulders.read_rows(str(tmp_path / "data/held.jsonl"))
    decoding = shoulders.DecodingConfig(max_new_tokens=2)
    first, second = (
        shoulders.evaluate(s, rows, templates, decoding=decoding) for s in (skill, again)
    )
    assert [p.prediction for p in first.predictions] == [p.prediction for p in second.predictions]


def test_every_path_may_be_a_text_or_a_path(tmp_path: Path) -> None:
    folder = save_tiny_lm(tmp_path / "lm")
    lm = shoulders.load_lm(folder, dtype="float32")
    (tmp_path / "t.yaml").write_text("t: ['{{ input }}']")
    config = shoulders.SkillConfig.model_validate(
        {"passes": [{"prompt": {"kind": "static", "length": 2}}]}
    )
    skill, other = (
        shoulders.Skill.create(
            lm, config, shoulders.load_encoder, torch.Generator().manual_seed(seed)
        )
        for seed in range(2)
    )
    for kind in (str, Path):
        templates = shoulders.Templates.read(kind(tmp_path / "t.yaml"))
        out = tmp_path / kind.__name__
        for name, one in (("a", skill), ("b", other)):
            shoulders.save_skill(one, kind(out / name), templates, {})
        shoulders.save_ensemble(kind(out), ["a", "b"], {})
        shoulders.export_to_peft(skill, kind(out / "peft"))
        shoulders.import_from_peft(kind(out / "peft"), lm)
        both, _ = shoulders.load(kind(out), lm)
        assert both.generate(["hi"])[0][0].token_ids
    assert skill.generate(["hi"]) == skill.generate(["hi"], shoulders.DecodingConfig())


def test_what_is_missing_is_missed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line with the extra, before an LM is loaded."""
    found = errors.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(errors, "find_spec", lambda n: None if n == name else found(n))

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an LM was loaded")

    values = recipe_values(save_tiny_lm(tmp_path / "lm"), tmp_path / "data", tensorboard=True)
    for module in (demo_run, comparison_run, training_run):
        monkeypatch.setattr(module, "load_lm", never)
    hide("tensorboard")
    with pytest.raises(shoulders.ShouldersError, match=r"tensorboard is not .*\[train\]"):
        shoulders.run_recipe(shoulders.make_recipe(values), tmp_path / "out")
    hide("matplotlib")
    with pytest.raises(shoulders.ShouldersError, match=r"matplotlib is not .*\[demo\]"):
        demo_run.run_demo(tmp_path / "demo", steps=3, seed=0, console=Console(quiet=True))
    plan = make_plan({
        "data": {"train": ["a"], "validation": ["b"]}, "test": ["c"], "budget": {"examples": 8},
        "methods": ["static", "mine"], "variants": {"mine": {"of": "lora_r4"}},
    })  # fmt: skip
    for name in ("matplotlib", "peft", "accelerate"):
        hide(name)
        with pytest.raises(shoulders.ShouldersError, match=rf"{name} is not .*\[compare\]"):
            shoulders.run_comparison(plan, tmp_path / "compared")
    assert plan.model_copy(update={"methods": ("static",)}).libraries == ["matplotlib"]


def test_every_requirement_is_pinned() -> None:
    """Else a fresh machine gets another version than the one that was tested."""
    lines = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    extras = distribution("shoulders").metadata.get_all("Provides-Extra") or []
    wanted, seen, here = [("shoulders", frozenset(extras))], set(), set()
    while wanted:
        name, asked = wanted.pop()
        if (name, asked) in seen:
            continue
        seen.add((name, asked))
        try:
            found = distribution(name)
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        here.add(canonicalize_name(name))
        for line in found.requires or ():
            one = Requirement(line)
            if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in asked or {""}):
                wanted.append((one.name, frozenset(one.extras)))
    assert len(here) > 50
    assert here - pinned - {"shoulders", "setuptools"} == set()
