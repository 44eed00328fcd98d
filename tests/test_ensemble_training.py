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
from shoulders.data.mixture import Mixture
from shoulders.errors import ArtefactError, RecipeError, ShouldersError, TrainingError
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.load import load_lm
from shoulders.skills.artefact import load_skill, read_artefact, save_skill
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import load_ensemble, read_ensemble, save_ensemble
from shoulders.training.ensemble import member_recipe, member_seed, run_ensemble
from shoulders.training.recipe import make_recipe, read_recipe
from shoulders.training.run import load_data, run_recipe
from shoulders.training.textual import run_textual
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


def test_only_its_own_members_are_taken_up(folder: Path, copied: Path, tmp_path: Path) -> None:
    """What stands in the folder of a member was trained by its recipe, on its data."""
    recipe = read_recipe(folder / "recipe.yaml")
    (copied / "ensemble.json").unlink()
    for key, changed in (("recipe", {"training": {"seed": 5}}), ("data_sha256", {"a": "b"})):
        file = copied / "member-1/skill.json"
        whole = file.read_text(encoding="utf-8")
        noted = json.loads(whole)
        noted["provenance"][key] = {**noted["provenance"][key], **changed}
        file.write_text(json.dumps(noted), encoding="utf-8")
        with pytest.raises(TrainingError, match="member-1: is no member of this ensemble"):
            run_ensemble(recipe, copied, resume=True)
        file.write_text(whole, encoding="utf-8")
    (copied / "members.json").unlink()
    run_ensemble(recipe, copied, resume=True)
    # A part that it begins at is the same one for all of them.
    values = {**recipe_values(folder / "lm", tmp_path / "data"), "members": 2}
    values["start"] = {"passes.0.prompt": str(copied / "member-0")}
    run_ensemble(make_recipe(values), tmp_path / "out")
    (tmp_path / "out/ensemble.json").unlink()
    shutil.rmtree(tmp_path / "out/member-1")
    shutil.rmtree(copied / "member-0")
    shutil.copytree(copied / "member-1", copied / "member-0")
    with pytest.raises(TrainingError, match=r"was begun with start\.passes\.0\.prompt as it was"):
        run_ensemble(make_recipe(values), tmp_path / "out", resume=True)


def test_a_recipe_that_trained_nothing_yet_can_be_put_right(folder: Path, tmp_path: Path) -> None:
    values = {**recipe_values(folder / "lm", tmp_path / "data"), "members": 2}
    wrong = {**values, "data": {**values["data"], "tasks": ["nowhere"]}}
    with pytest.raises(ShouldersError, match="nowhere"):
        run_ensemble(make_recipe(wrong), tmp_path / "out")
    run_ensemble(make_recipe(values), tmp_path / "out", resume=True)


def test_damage_is_named(copied: Path, folder: Path, tmp_path: Path) -> None:
    lm = load_lm(str(folder / "lm"), dtype="float32")
    with pytest.raises(ArtefactError, match="already holds a skill or an ensemble"):
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
    with pytest.raises(ArtefactError, match=r"'\.\./outside' is no folder inside"):
        read_ensemble(copied)
    changed(members={"member-0": first, "a\0b": first})
    with pytest.raises(ArtefactError, match="is no folder inside"):
        read_ensemble(copied)
    changed()
    (copied / "member-1/skill.safetensors").write_bytes(b"")
    with pytest.raises(ArtefactError, match=r"member-1/skill\.safetensors: damaged or edited"):
        load_ensemble(copied, lm)


def test_members_that_do_not_go_together_are_refused(folder: Path, tmp_path: Path) -> None:
    """Before anything is written: what is on disk can be loaded."""
    for number, changed in enumerate(
        (
            {},
            {"lm": {"fingerprint": "another"}},
            {"skill": {"format": {"answer_prefix": "="}}},
            {"templates": {"north": ["{{ input }} it is"]}},
        )
    ):
        one = shutil.copytree(folder / "out/member-0", tmp_path / f"{number}")
        noted = json.loads((one / "skill.json").read_text())
        for key, values in changed.items():
            for name, value in values.items():
                noted[key][name] = {**noted[key][name], **value} if name == "format" else value
        (one / "skill.json").write_text(json.dumps(noted))
    shutil.copytree(tmp_path / "0", tmp_path / "same")
    for members, why in (
        (["0", "1"], "1: was trained on the LM"),
        (["0", "2"], "2: begins answers with '=', 0 with ' '"),
        (["0", "3"], "3: puts rows into other words than 0"),
        (["0", "same"], "same: is the same skill as 0"),
        (["0"], "two different members or more"),
        (["0", "0"], "two different members or more"),
        (["0", "../x"], "'../x' is no folder inside"),
    ):
        with pytest.raises(ArtefactError, match=why):
            save_ensemble(tmp_path, members, {})
    assert not (tmp_path / "ensemble.json").exists()


def test_single_skills_and_ensembles_keep_out_of_each_other(copied: Path, folder: Path) -> None:
    one = read_recipe(folder / "recipe.yaml", ["members=1"])
    with pytest.raises(TrainingError, match="already holds a finished skill"):
        run_recipe(one, copied)
    lm = load_lm(str(folder / "lm"), dtype="float32")
    skill, templates = load_skill(copied / "member-0", lm)
    with pytest.raises(ArtefactError, match="already holds a skill"):
        save_skill(skill, copied, templates, {})
    (copied / "ensemble.json").unlink()
    with pytest.raises(TrainingError, match="holds an ensemble that was begun"):
        run_recipe(one, copied, resume=True)
    texts = recipe_values(folder / "lm", copied.parent / "texts")
    texts["skill"] = {"passes": [{"prompt": STATIC, "propose": {"n": 2}}, {"prompt": STATIC}]}
    texts |= {"start": {"passes.0.prompt": str(copied / "member-0")}, "cross_fit": {}}
    with pytest.raises(TrainingError, match="holds an ensemble that was begun"):
        run_textual(make_recipe(texts), copied, resume=True)
    (copied / "members.json").unlink()
    (copied / "checkpoints").mkdir()
    with pytest.raises(TrainingError, match="holds a single skill's unfinished run"):
        run_ensemble(read_recipe(folder / "recipe.yaml"), copied, resume=True)


def test_examples_that_are_counted_are_the_same_for_all_members(tmp_path: Path) -> None:
    values = {**recipe_values(tmp_path / "lm", tmp_path / "data", seed=4), "members": 2}
    free = make_recipe(values)
    assert [member_recipe(free, n).data for n in range(2)] == [free.data] * 2
    values["data"] = {**values["data"], "examples": 6}
    recipe = make_recipe(values)
    rows, _, templates = load_data(recipe.data)
    orders = []
    for number in range(2):
        own = member_recipe(recipe, number)
        mixture = Mixture(rows, templates, own.data, own.training.seed)
        orders.append([text for _, text in mixture.window(0, 6)])
        assert sorted(text for _, text in mixture.window(6, 6)) == sorted(orders[-1])
    plain = Mixture(rows, templates, recipe.data, 4)
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(t for _, t in plain.window(0, 6))
    assert orders[0] != orders[1]


def test_what_members_start_from_is_trained_once(folder: Path, tmp_path: Path) -> None:
    first = write_recipe(tmp_path / "first.yaml", recipe_values(folder / "lm", tmp_path / "data"))
    values = {**recipe_values(folder / "lm", tmp_path / "data"), "members": 2}
    values["start"] = {"passes.0.prompt": str(first)}
    run_ensemble(make_recipe(values), tmp_path / "out")
    assert (tmp_path / "out/parts/first/skill.json").is_file()
    assert not (tmp_path / "out/member-1/parts").exists()
    several = {**recipe_values(folder / "lm", tmp_path / "data"), "members": 2}
    values["start"] = {"passes.0.prompt": str(write_recipe(tmp_path / "two.yaml", several))}
    with pytest.raises(RecipeError, match=r"start\.passes\.0\.prompt: .*two\.yaml trains an ens"):
        run_ensemble(make_recipe(values), tmp_path / "other")


def test_recipes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    values = recipe_values(tmp_path / "lm", tmp_path / "data")
    with pytest.raises(RecipeError, match="key 'members'"):
        make_recipe({**values, "members": 0})
    linked = {"passes": [{"link": {"layers": 1, "width": 16, "heads": 2}}, {"prompt": STATIC}]}
    with pytest.raises(RecipeError, match="members: an ensemble is of skills of one pass"):
        make_recipe({**values, "skill": linked, "members": 2})
    with pytest.raises(TrainingError, match="use train"):
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
    assert facts["members"]["member-1"]["prompt"]["kind"] == "static"
    assert facts["frozen_parameters"] == lm.parameters
    (tmp_path / "text.txt").write_text("the capital of france is paris. " * 9)
    for arguments, why in (
        (("--data", tmp_path / "text.txt"), "is an ensemble, which answers rows"),
        (("--data", data, "--recurse-below", 0.5), "has no calibrated gate"),
        (("--data", data, "--vllm-url", "http://127.0.0.1:9"), "an ensemble is answered here"),
    ):
        code, said = run("eval", folder / "out", *arguments)
        assert code == 2, said
        assert why in said
