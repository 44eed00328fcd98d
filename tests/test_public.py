"""The package's own face: names that programs import from `shoulders` itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import shoulders
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
