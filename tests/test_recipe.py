"""Recipes: every mistake is named with its key, and the recipes we ship are valid."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoulders.cli.app import main
from shoulders.data.templates import Templates
from shoulders.errors import DataError, RecipeError
from shoulders.prompts.build import DEFAULT_KIND, producer_kinds, rates_of
from shoulders.training.reader_recipe import is_reader, read_reader_recipe
from shoulders.training.recipe import Recipe, make_recipe, read_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
VALUES: dict[str, Any] = {
    "lm": {"name": "embedded"},
    "skill": {"passes": [{"prompt": {"kind": "idpt", "length": 5}}]},
    "data": {"train": ["train.jsonl"], "validation": ["held.jsonl"]},
    "training": {"steps": 10, "optimizer": {"lr": 0.01}},
}
Change = Callable[[dict[str, Any]], object]


def _prompt(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = values["skill"]["passes"][0]["prompt"]
    return found


def _message(change: Change) -> str:
    values = copy.deepcopy(VALUES)
    change(values)
    with pytest.raises(RecipeError) as caught:
        make_recipe(values, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ")
    assert "\n" not in message
    return message


def _file(folder: Path, values: Any = VALUES) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_the_base_of_these_tests_is_valid() -> None:
    recipe = make_recipe(copy.deepcopy(VALUES))
    assert recipe.training.steps == 10
    assert recipe.skill.passes[0].prompt is not None
    assert recipe.skill.passes[0].prompt["length"] == 5
    # Defaults are written out, so that a stored recipe says everything...
    assert recipe.skill.passes[0].prompt["generator"]["encoder"] == "embedded"
    # ... and reads back as the same recipe.
    assert make_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("kind", [None, *producer_kinds()])
def test_a_producer_brings_its_own_rates(kind: str | None) -> None:
    values = copy.deepcopy(VALUES)
    del values["training"]["optimizer"]
    values["skill"]["passes"][0]["prompt"] = {} if kind is None else {"kind": kind}
    recipe = make_recipe(values)
    assert recipe.skill.passes[0].prompt is not None
    assert recipe.skill.passes[0].prompt["kind"] == (kind or DEFAULT_KIND)
    found = recipe.training.optimizer.model_dump(exclude_unset=True)
    assert found == rates_of(kind or DEFAULT_KIND)
    assert make_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("kind", producer_kinds())
def test_a_producers_recipe_writes_its_rates_out(kind: str) -> None:
    """So that one of them can be overridden; they must not drift apart."""
    path = next(path for path in RECIPES if path.stem == f"multitask_{kind}")
    optimizer = read_recipe(path).training.optimizer
    assert optimizer.model_dump(include={"kind", "lr", "lr_for"}) == {
        "kind": "adamw",
        "lr_for": {},
        **(rates_of(kind) or {}),
    }


def test_several_passes_have_no_rates_of_their_own() -> None:
    def change(values: dict[str, Any]) -> None:
        del values["training"]["optimizer"]
        values["skill"]["passes"].insert(0, {"link": {}})

    assert "key 'training.optimizer' is missing" in _message(change)


@pytest.mark.parametrize(
    ("change", "key", "meant"),
    [
        (lambda v: v.update(traning={}), "traning", "training"),
        (lambda v: v["lm"].update(nam="x"), "lm.nam", "name"),
        (lambda v: v["skill"].update(pases=[]), "skill.pases", "passes"),
        (lambda v: v["skill"]["passes"][0].update(promt={}), "skill.passes.0.promt", "prompt"),
        (lambda v: _prompt(v).update(lenght=5), "skill.passes.0.prompt.lenght", "length"),
        (
            lambda v: _prompt(v).update(init={"sorce": "text"}),
            "skill.passes.0.prompt.init.sorce",
            "source",
        ),
        (
            lambda v: _prompt(v).update(generator={"widht": 8}),
            "skill.passes.0.prompt.generator.widht",
            "width",
        ),
        (
            lambda v: v["skill"].update(format={"seperator": ""}),
            "skill.format.seperator",
            "separator",
        ),
        (
            lambda v: v["skill"]["passes"].insert(0, {"link": {"widht": 3}}),
            "skill.passes.0.link.widht",
            "width",
        ),
        (lambda v: v["data"].update(trian=[]), "data.trian", "train"),
        (lambda v: v["training"].update(step=3), "training.step", "steps"),
        (lambda v: v["training"].update(sede=3), "training.sede", "seed"),
        (
            lambda v: v["training"].update(stepz=v["training"].pop("steps")),
            "training.stepz",
            "steps",
        ),
        (lambda v: v.update(date=v.pop("data")), "date", "data"),
        (
            lambda v: v["training"]["optimizer"].update(weight_decays=0),
            "training.optimizer.weight_decays",
            "weight_decay",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(change: Change, key: str, meant: str) -> None:
    assert _message(change) == f"my.yaml: unknown key '{key}' (did you mean '{meant}'?)"


def test_the_kind_of_a_link_is_named_as_it_is_written() -> None:
    said = _message(lambda v: v["skill"]["passes"].insert(0, {"link": {"kind": "nope"}}))
    assert said.startswith("my.yaml: key 'skill.passes.0.link': ")
    assert "'nope'" in said


@pytest.mark.parametrize(
    "value", ["2024-13-45", "0x_", "!!int abc", "!!timestamp abc", "[" * 700, "1" * 5000]
)
def test_what_yaml_cannot_read_is_said(value: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a YAML value"):
        read_recipe(_file(tmp_path), [f"training.seed={value}"])
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not valid YAML"):
        read_recipe(_file(tmp_path, f"skill: {value}"))
    with pytest.raises(DataError, match=r"recipe\.yaml: not valid YAML"):
        Templates.read(_file(tmp_path, f"task: {value}"))
    with pytest.raises(RecipeError, match="holds no further keys"):
        read_recipe(_file(tmp_path), ["skill.passes.².prompt=x"])


def test_a_key_like_no_other_gets_no_suggestion() -> None:
    assert _message(lambda v: v["lm"].update(zzz=1)) == "my.yaml: unknown key 'lm.zzz'"


def test_a_key_of_another_kind_of_producer_is_unknown() -> None:
    message = _message(lambda v: _prompt(v).update(kind="static", generator={"width": 8}))
    assert "unknown key 'skill.passes.0.prompt.generator'" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda v: v.pop("skill"), "skill"),
        (lambda v: v.pop("training"), "training"),
        (lambda v: v["data"].pop("train"), "data.train"),
        (lambda v: v["training"].pop("steps"), "training.steps"),
        (lambda v: v["training"]["optimizer"].pop("lr"), "training.optimizer.lr"),
    ],
)
def test_a_missing_key_is_named(change: Change, key: str) -> None:
    assert _message(change) == f"my.yaml: key '{key}' is missing"


def test_without_data_both_kinds_of_it_are_named() -> None:
    message = _message(lambda v: v.pop("data"))
    assert message == "my.yaml: give either data (tasks) or text (running text) to train on"


@pytest.mark.parametrize("kind", ["statik", None, 3, ["static"]])
def test_an_unknown_kind_lists_the_known_ones(kind: Any) -> None:
    message = _message(lambda v: _prompt(v).update(kind=kind))
    assert "producer kind" in message
    assert f"known: {', '.join(producer_kinds())}" in message
    assert kind != "statik" or "did you mean 'static'?" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda v: v.update(lm="embedded"), "lm"),
        (lambda v: v["lm"].update(dtype="float8"), "lm.dtype"),
        (lambda v: v.update(skill=3), "skill"),
        (lambda v: v["skill"].update(passes=[]), "skill.passes"),
        (lambda v: v["skill"]["passes"][0].update(prompt="static"), "skill.passes.0.prompt"),
        (lambda v: _prompt(v).update(length="many"), "skill.passes.0.prompt.length"),
        (lambda v: _prompt(v).update(length=0), "skill.passes.0.prompt.length"),
        (lambda v: v["data"].update(train="train.jsonl"), "data.train"),
        (lambda v: v["data"].update(train=[]), "data.train"),
        (lambda v: v["data"].update(temperature=0), "data.temperature"),
        (lambda v: v["data"].update(tasks=["a"], exclude=["a"]), "data"),
        (lambda v: v["training"].update(steps="many"), "training.steps"),
        (lambda v: v["training"].update(steps=0), "training.steps"),
        (lambda v: v["training"].update(steps=1.5), "training.steps"),
        (lambda v: v["training"].update(decay="slow"), "training.decay"),
        (lambda v: v["training"].update(clip=0), "training.clip"),
        (lambda v: v["training"]["optimizer"].update(lr=-1), "training.optimizer.lr"),
        (lambda v: v["training"]["optimizer"].update(lr=float("nan")), "training.optimizer.lr"),
        (lambda v: v["training"]["optimizer"].update(kind="sgd"), "training.optimizer.kind"),
        (
            lambda v: v["training"]["optimizer"].update(lr_for={"base": "x"}),
            "training.optimizer.lr_for.base",
        ),
    ],
)
def test_a_wrong_value_names_its_key(change: Change, key: str) -> None:
    assert f"my.yaml: key '{key}': " in _message(change)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("lm: {name: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("just words", "a recipe is a mapping"),
        ("1: 2\n", "is missing"),
        ("training: {steps: 9}\nlm: {}\ntraining: {steps: 2}\n", "'training' is given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(text: str, reason: str, tmp_path: Path) -> None:
    path = _file(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"lm: \xff\xfe")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(path)


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        read_recipe(tmp_path / name)


# -- overrides ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("training.steps=100", lambda r: r.training.steps, 100),
        ("training.optimizer.lr=3e-2", lambda r: r.training.optimizer.lr, 0.03),
        ("training.optimizer.lr=3.0e-2", lambda r: r.training.optimizer.lr, 0.03),
        ("training.optimizer.betas=[0.5, 0.75]", lambda r: r.training.optimizer.betas, (0.5, 0.75)),
        (
            "training.optimizer.lr_for.base=1e-3",
            lambda r: r.training.optimizer.lr_for.get("base"),
            1e-3,
        ),
        ("training.tensorboard=true", lambda r: r.training.tensorboard, True),
        ("training.decay=cosine", lambda r: r.training.decay, "cosine"),
        ("data.tasks=[a, b]", lambda r: r.data.tasks, ["a", "b"]),
        ("data.tasks=null", lambda r: r.data.tasks, None),
        ("lm.name=some/model=x", lambda r: r.lm.name, "some/model=x"),
        ("skill.passes.0.prompt.length=7", lambda r: r.skill.passes[0].prompt["length"], 7),
        ("skill.format.keep=end", lambda r: r.skill.format.keep, "end"),
    ],
)
def test_an_override_changes_its_key_alone(
    override: str, get: Callable[[Recipe], Any], expected: Any, tmp_path: Path
) -> None:
    path = _file(tmp_path)
    assert get(read_recipe(path)) != expected or expected is None
    changed = read_recipe(path, [override])
    assert get(changed) == expected
    assert type(get(changed)) is type(expected)
    before, after = read_recipe(path).model_dump(), changed.model_dump()
    part = override.split(".")[0]
    assert {k for k in before if before[k] != after[k]} <= {part}


def test_an_override_of_one_rate_leaves_the_producers_others(tmp_path: Path) -> None:
    values = copy.deepcopy(VALUES)
    del values["training"]["optimizer"]
    path, own = _file(tmp_path, values), copy.deepcopy(rates_of("static_lora"))
    assert own is not None
    given = ["training.optimizer.lr_for.factors=1e-4", "skill.passes.0.prompt={kind: static_lora}"]
    found = read_recipe(path, given).training.optimizer.model_dump(exclude_unset=True)
    assert found == {**own, "lr_for": {"factors": 1e-4}}
    assert rates_of("static_lora") == own
    whole = read_recipe(path, [*given[1:], "training.optimizer={lr: 0.5}"]).training.optimizer
    assert whole.model_dump(exclude_unset=True) == {"lr": 0.5}
    with pytest.raises(RecipeError, match=r"recipe\.yaml: .*'nothing'"):
        read_recipe(path, [*given[:1], "skill.passes.0.prompt.kind=nothing"])


def test_later_overrides_win(tmp_path: Path) -> None:
    recipe = read_recipe(_file(tmp_path), ["training.steps=3", "training.steps=4"])
    assert recipe.training.steps == 4


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("training.stepz=3", "unknown key 'training.stepz' (did you mean 'steps'?)"),
        ("training.steps.more=3", "holds no further keys"),
        ("skill.passes.1.prompt=null", "holds no further keys"),
        ("skill.passes.first.prompt=null", "holds no further keys"),
        ("skill.passes.5=null", "'5' is not a place in that list"),
        ("training.steps=[", "is not a YAML value"),
        ("training.steps=many", "key 'training.steps'"),
        ("training.optimizer.lr=inf", "key 'training.optimizer.lr'"),
        ("skill.passes.0={prompt: null}", "the recipe trains nothing"),
        ("training.remember_first_pass=true", "remember_first_pass is for skills of several"),
        ("skill.passes.0.propose={temperature: .inf}", "passes.0.propose.temperature"),
        (
            "start={passes.0.promt: other}",
            "start.passes.0.promt: the skill has no such part (did you mean 'passes.0.prompt'?)",
        ),
    ],
)
def test_a_bad_override_is_explained(override: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(_file(tmp_path), [override])
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


# -- paths -------------------------------------------------------------------------------


def test_paths_are_looked_up_beside_the_recipe_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    beside.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (beside / "train.jsonl").touch()
    (here / "train.jsonl").touch()
    (here / "held.jsonl").touch()
    data = read_recipe(_file(beside)).data
    assert data.train == [str(beside / "train.jsonl")]
    assert data.validation == [str(here / "held.jsonl")]


def test_one_text_by_two_names_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    text = "text: {train: [a.txt], validation: [./a.txt]}"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"skill: {{passes: [{{prompt: {{}}}}]}}\n{text}\ntraining: {{steps: 1}}\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: text: .*in both train and validation"):
        read_recipe(recipe)


def test_answers_select_where_there_are_rows_to_answer() -> None:
    def without(values: dict[str, Any]) -> None:
        values["data"].pop("validation", None)
        values["training"].update(select="exact_match")

    assert "exact_match needs rows to select on: data.validation" in _message(without)


# -- the recipes we ship -----------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_is_valid_without_its_data(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Elsewhere its data cannot be found; nothing may be read, loaded or written.
    moved = tmp_path / "elsewhere" / path.name
    moved.parent.mkdir()
    moved.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    for file in (path, moved):
        recipe = read_reader_recipe(file) if is_reader(file) else read_recipe(file)
        assert any(one.prompt or one.link for one in recipe.skill.passes)
        monkeypatch.setattr(sys, "argv", ["shoulders", "train", str(file), "--dry-run"])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed = " ".join(capsys.readouterr().out.split())
        assert "valid" in printed
        assert f"{recipe.training.steps} steps" in printed
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["elsewhere", path.name])


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_never_reads_a_test_split(path: Path) -> None:
    data: Any = read_reader_recipe(path).reader if is_reader(path) else read_recipe(path).data
    data = data or read_recipe(path).text
    for name in (*data.train, *data.validation):
        assert not Path(name).stem.startswith("test")
    assert not set(data.train) & set(data.validation)
