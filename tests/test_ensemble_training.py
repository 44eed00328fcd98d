"""Training an ensemble, going on with one, its folder, and the commands that take it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoulders.cli.app import main
from shoulders.errors import ArtefactError, RecipeError, TrainingError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import load_skill, read_artefact
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import load_ensemble, read_ensemble, save_ensemble
from shoulders.training.ensemble import member_seed, run_ensemble
from shoulders.training.recipe import make_recipe, read_recipe
from shoulders.training.run import run_recipe
from tiny_models import STATIC, recipe_values, rows, save_tiny_lm, write_jsonl, write_recipe

TEXTS = ["north question 51 and so on", "south question 50"]
SHORT = DecodingConfig(max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two members, and what it was trained into; not to be changed."""
    folder = tmp_path_factory.mktemp("ensemble")
    lm = save_tiny_lm(folder / "lm")
    values = {**recipe_values(lm, folder / "data", steps=3, seed=4), "members": 2}
    recipe = write_recipe(folder / "recipe.yaml", values)
    run_ensemble(read_recipe(recipe), folder / "out")
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "out", tmp_path / "copied"))


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process; return its code and what it has printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["shoulders", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), "".join(capfd.readouterr())

    return command


def test_members_are_what_their_own_seeds_train(folder: Path, tmp_path: Path) -> None:
    assert [member_seed(4, 2, number) for number in range(2)] == [8, 9]
    assert {member_seed(s, 3, n) for s in range(3) for n in range(3)} == set(range(9))
    values = recipe_values(folder / "lm", tmp_path / "data", steps=3, seed=9)
    alone = run_recipe(make_recipe(values), tmp_path / "alone")
    lm = load_lm(str(folder / "lm"), dtype="float32")
    ensemble, templates = load_ensemble(folder / "out", lm)
    assert isinstance(ensemble, Ensemble)
    assert ensemble.members[1].generate(TEXTS, SHORT) == alone.generate(TEXTS, SHORT)
    assert ensemble.members[0].generate(TEXTS, SHORT) != alone.generate(TEXTS, SHORT)
    assert ensemble.trained_parameters == 2 * alone.trained_parameters
    # Its bytes are all that counts: loaded again it answers the same.
    again, _ = load_ensemble(folder / "out", lm)
    assert again.generate(TEXTS, SHORT) == ensemble.generate(TEXTS, SHORT)
    assert templates.as_dict() == load_skill(folder / "out/member-0", lm)[1].as_dict()


def test_a_stopped_one_goes_on(folder: Path, copied: Path) -> None:
    (copied / "ensemble.json").unlink()
    shutil.rmtree(copied / "member-1")
    first = (copied / "member-0/skill.json").read_bytes()
    recipe = read_recipe(folder / "recipe.yaml")
    with pytest.raises(TrainingError, match="holds an unfinished run; add --resume"):
        run_ensemble(recipe, copied)
    other = read_recipe(folder / "recipe.yaml", ["training.seed=5"])
    with pytest.raises(TrainingError, match="was begun with another recipe"):
        run_ensemble(other, copied, resume=True)
    run_ensemble(recipe, copied, resume=True)
    assert (copied / "member-0/skill.json").read_bytes() == first
    wanted, found = (read_artefact(f / "member-1").tensors_sha256 for f in (folder / "out", copied))
    assert found == wanted
    with pytest.raises(TrainingError, match="already holds a finished skill"):
        run_ensemble(recipe, copied, resume=True)


def test_damage_is_named(copied: Path, folder: Path, tmp_path: Path) -> None:
    lm = load_lm(str(folder / "lm"), dtype="float32")
    with pytest.raises(ArtefactError, match="already holds an ensemble"):
        save_ensemble(copied, ["member-0", "member-1"], {})
    with pytest.raises(ArtefactError, match="holds an ensemble; one of its members is asked for"):
        load_skill(copied, lm)
    noted = json.loads((copied / "ensemble.json").read_text())

    def changed(**values: Any) -> None:
        (copied / "ensemble.json").write_text(json.dumps({**noted, **values}))

    first, second = noted["members"].values()
    changed(members={"member-0": second, "member-1": second})
    with pytest.raises(ArtefactError, match="member-0: is another skill than"):
        read_ensemble(copied)
    changed(members={"member-0": first})
    with pytest.raises(ArtefactError, match="key 'members'"):
        read_ensemble(copied)
    shutil.copytree(copied / "member-0", tmp_path / "outside")
    changed(members={"member-0": first, "../outside": first})
    with pytest.raises(ArtefactError, match="outside' lies outside"):
        read_ensemble(copied)
    changed()
    (copied / "member-1/skill.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"member-1/skill\.safetensors: damaged or edited"):
        load_ensemble(copied, lm)


def test_recipes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "lm", tmp_path / "data")
    with pytest.raises(RecipeError, match="key 'members'"):
        make_recipe({**values, "members": 0})
    linked = {"passes": [{"link": {"layers": 1, "width": 16, "heads": 2}}, {"prompt": STATIC}]}
    with pytest.raises(RecipeError, match="members: an ensemble is of skills of one pass"):
        make_recipe({**values, "skill": linked, "members": 2})
    with pytest.raises(TrainingError, match="use run_ensemble"):
        run_recipe(make_recipe({**values, "members": 2}), tmp_path / "out")


def test_commands_take_it(folder: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    lm = load_lm(str(folder / "lm"), dtype="float32")
    ensemble, _ = load_ensemble(folder / "out", lm)
    data = write_jsonl(tmp_path / "rows.jsonl", rows("north", 3))
    code, said = run("train", folder / "recipe.yaml", "--dry-run")
    assert code == 0
    assert "2 members, prompt static" in said
    code, said = run("generate", "--skill", folder / "out", "--text", TEXTS[0],
                     "--max-new-tokens", 5)  # fmt: skip
    assert code == 0, said
    assert ensemble.generate(TEXTS[:1], SHORT)[0][0].text in said
    code, said = run("eval", folder / "out", "--data", data, "--json", "found.json")
    assert code == 0, said
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["trained_parameters"] == ensemble.trained_parameters
    code, said = run("info", folder / "out", "--json", "facts.json")
    assert code == 0, said
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["trained_parameters"] == ensemble.trained_parameters
    assert list(facts["members"]) == ["member-0", "member-1"]
    (tmp_path / "text.txt").write_text("the capital of france is paris. " * 9)
    for arguments, why in (
        (("--data", tmp_path / "text.txt"), "is an ensemble, which answers rows"),
        (("--data", data, "--recurse-below", 0.5), "has no calibrated gate"),
        (("--data", data, "--vllm-url", "http://127.0.0.1:9"), "an ensemble is answered here"),
    ):
        code, said = run("eval", folder / "out", *arguments)
        assert code == 2, said
        assert why in said
