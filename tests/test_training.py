"""Promises 2, 5 and 8: no leak, resumes bit for bit, learns or says so."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import DynamicCache

from shoulders.data.mixture import Mixture
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import (
    ArtefactError,
    DataError,
    DivergedError,
    InterruptedTraining,
    RecipeError,
    ShouldersError,
    TrainingError,
    WindowError,
)
from shoulders.files import only_writer
from shoulders.lm import states
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.prompts.build import producer_kinds
from shoulders.skills.artefact import FILE, load_skill
from shoulders.skills.skill import Skill
from shoulders.training import checkpoint, fit, run, step
from shoulders.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from shoulders.training.configs import OptimizerConfig, TrainingConfig
from shoulders.training.examples import check_window, example_at, example_of
from shoulders.training.interrupt import deferred_interrupt
from shoulders.training.objective import Example, answer_losses
from shoulders.training.optimizer import make_optimizer, rate_factor
from shoulders.training.recipe import Recipe, make_recipe
from shoulders.training.run import load_data, run_recipe
from shoulders.training.start import same_recipe, trained_parts
from shoulders.training.validation import choose_rows
from tiny_models import (
    environment,
    prompt_spec,
    recipe_values,
    rows,
    save_tiny_encoder,
    save_tiny_lm,
    write_jsonl,
    write_recipe,
)

KINDS = producer_kinds()
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw", "lr": 0.01},
    "adafactor": {"kind": "adafactor", "lr": 0.03, "weight_decay": 0.01},
    "muon": {"kind": "muon", "lr": 0.01, "weight_decay": 0.01},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def lm(folder: Path) -> FrozenLM:
    found: FrozenLM = load_lm(str(save_tiny_lm(folder / "lm")), dtype="float32")
    return found


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Path:
    return save_tiny_encoder(folder / "encoder")


@pytest.fixture(autouse=True)
def _surroundings(folder: Path, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of our own, and the one tiny LM instead of loading it for every run."""
    monkeypatch.setenv("SHOULDERS_CACHE", str(folder / "cache"))

    def load(name: str, **settings: Any) -> FrozenLM:
        found: FrozenLM = lm if name == lm.name else load_lm(name, **settings)
        return found

    monkeypatch.setattr(run, "load_lm", load)


def _recipe(lm: FrozenLM, folder: Path, **training: Any) -> Recipe:
    return make_recipe(recipe_values(Path(lm.name), folder / "data", **training))


def _parts(recipe: Recipe, lm: FrozenLM) -> tuple[Skill, Mixture, list[Row], Templates]:
    """Return what `fit` is given."""
    training, validation, templates = load_data(recipe.data)
    skill = Skill.create(
        lm, recipe.skill, load_encoder, torch.Generator().manual_seed(recipe.training.seed)
    )
    return (
        skill,
        Mixture(training, templates, recipe.data, recipe.training.seed),
        validation,
        (templates),
    )


def _fit(recipe: Recipe, lm: FrozenLM, out: Path, **settings: Any) -> Skill:
    skill, mixture, validation, templates = _parts(recipe, lm)
    fit.fit(skill, mixture, validation, templates, recipe, out, **settings)
    return skill


def _module(skill: Skill) -> nn.Module:
    assert isinstance(skill.producer, nn.Module)
    return skill.producer


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _tensors(folder: Path) -> bytes:
    return (folder / "skill.safetensors").read_bytes()


# -- promise 2: the loss counts answer tokens only ---------------------------------------

EXAMPLES = [
    Example("a", [5, 6, 7], [40, 41, 0], "t"),
    Example("b", [9], [50, 0], "t"),
    Example("c", [11, 12, 13, 14, 15, 16, 17, 18], [60], "u"),
]


def _prompt(lm: FrozenLM, form: str, count: int = len(EXAMPLES)) -> Prompt:
    """Return random prompts, one per row; row `i` is the same for any `count`."""
    draw = torch.Generator().manual_seed(0)
    if form == "none":
        return Prompt.empty(count)
    if form == "shared":
        return Prompt.of_vectors(torch.randn(1, 3, lm.hidden_size, generator=draw)).repeated(count)
    if form == "vectors":
        return Prompt.of_vectors(torch.randn(count, 3, lm.hidden_size, generator=draw))
    s = lm.prefix_shape
    shape = (count, s.layers, 2, s.kv_heads, 3, s.head_dim)
    return Prompt.of_keys_values(torch.randn(*shape, generator=draw))


@torch.no_grad()
def _reference(lm: FrozenLM, prompt: Prompt, examples: Sequence[Example]) -> list[torch.Tensor]:
    """Full logits of Hugging Face's model row by row; cross entropy at the answers."""
    losses = []
    for row, example in enumerate(examples):
        ids = torch.tensor(example.input_ids + example.answer_ids)
        vectors = prompt.vectors[row]
        embedded = lm.model.get_input_embeddings()(ids)
        if vectors.numel():
            embedded = torch.cat([vectors, embedded])
        cache = None
        if prompt.keys_values.shape[4]:
            cache = DynamicCache()
            for layer, (keys, values) in enumerate(prompt.keys_values[row]):
                cache.update(keys[None], values[None], layer)
        logits = lm.model(inputs_embeds=embedded[None], past_key_values=cache).logits[0]
        before = len(embedded) - len(example.answer_ids) - 1
        at = logits[before : before + len(example.answer_ids)].float()
        losses.append(-at.log_softmax(-1)[range(len(at)), example.answer_ids])
    return losses


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", ["none", "shared", "vectors", "keys_values"])
def test_losses_are_those_of_the_plain_model_at_answer_tokens(
    form: str, packed: bool, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    prompt = _prompt(lm, form)
    with torch.no_grad():
        losses = answer_losses(lm, prompt, EXAMPLES)
    expected = torch.cat(_reference(lm, prompt, EXAMPLES))
    assert len(losses) == sum(len(e.answer_ids) for e in EXAMPLES)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", ["none", "shared", "vectors", "keys_values"])
def test_a_rows_losses_do_not_depend_on_its_batch(
    form: str, packed: bool, lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    prompt = _prompt(lm, form)
    longer = replace(EXAMPLES[1], input_ids=list(range(20, 60)), answer_ids=[3, 4, 5, 6])
    other = [EXAMPLES[0], longer, EXAMPLES[2]]
    with torch.no_grad():
        together = answer_losses(lm, prompt, EXAMPLES).split([3, 2, 1])
        mates = answer_losses(lm, prompt, other).split([3, 4, 1])
        for row in (0, 2):
            alone = answer_losses(lm, prompt.select([row]), [EXAMPLES[row]])
            torch.testing.assert_close(together[row], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mates[row], alone, rtol=1e-5, atol=1e-5)


def test_input_tokens_are_not_counted(lm: FrozenLM) -> None:
    """The loss given an input is that of the answer, whatever the input's own likelihood."""
    likely = answer_losses(lm, Prompt.empty(1), [Example("a", [5] * 30, [7, 0], "t")])
    assert likely.shape == (2,)
    one = Example("a", [5, 6], [7, 8, 9, 0], "t")
    same = Example("a", [5, 6, 7, 8], [9, 0], "t")
    all_of_it = answer_losses(lm, Prompt.empty(1), [one])
    end_of_it = answer_losses(lm, Prompt.empty(1), [same])
    torch.testing.assert_close(all_of_it[2:], end_of_it, rtol=1e-5, atol=1e-5)


def test_logged_loss_is_the_mean_over_answer_tokens(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path, steps=1, micro_tokens=30)
    skill, mixture, _, _ = _parts(recipe, lm)
    examples = [example_at(skill, mixture, i, 0) for i in range(4)]
    with torch.no_grad():
        prompt = skill.prompt([e.text for e in examples])
        expected = torch.cat(_reference(lm, prompt, examples)).mean()
    _fit(recipe, lm, tmp_path / "out")
    assert _log(tmp_path / "out")[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


# -- promise 2: producers never see targets ----------------------------------------------


def _spied(recipe: Recipe, lm: FrozenLM, out: Path) -> list[str]:
    """Train and return every text the producer was called with."""
    skill, mixture, _, templates = _parts(recipe, lm)
    seen: list[str] = []
    _module(skill).register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    fit.fit(skill, mixture, [], templates, recipe, out)
    return seen


def test_producers_get_exactly_the_inputs(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path, steps=5)
    _, mixture, _, _ = _parts(recipe, lm)
    expected = [text for _, text in mixture.window(0, 20)]
    seen = _spied(recipe, lm, tmp_path / "out")
    for at in range(5):
        window = slice(4 * at, 4 * at + 4)
        assert sorted(seen[window]) == sorted(expected[window])
    assert len(seen) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_changing_targets_leaves_prompts_unchanged(
    kind: str, lm: FrozenLM, encoder: Path, tmp_path: Path
) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data", prompt_spec(kind, encoder))
    recipe = make_recipe(values)
    prompts, losses = [], []
    for answer in (None, "zebra zebra"):
        given = [*rows("north", 9), *rows("south", 5)]
        if answer:
            given = [{**row, "targets": [answer]} for row in given]
        write_jsonl(Path(recipe.data.train[0]), given)
        skill, mixture, _, _ = _parts(recipe, lm)
        examples = [example_at(skill, mixture, i, 0) for i in range(6)]
        for parameter in _module(skill).parameters():  # so that the input matters at once
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            prompt = skill.prompt([e.text for e in examples])
            prompts.append(prompt)
            losses.append(answer_losses(lm, prompt, examples))
    assert torch.equal(prompts[0].vectors, prompts[1].vectors)
    assert torch.equal(prompts[0].keys_values, prompts[1].keys_values)
    assert losses[0].shape != losses[1].shape  # the targets did change


def test_validation_rows_that_stand_in_training_are_not_used(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data", steps=3)
    both = [*rows("north", 2), *rows("north", 2, 90), *rows("south", 1, 90)]
    both[0]["targets"] = ["another answer"]  # still the same input
    # The same input under another task is another example.
    both.append({**rows("north", 1)[0], "task": "south"})
    write_jsonl(Path(values["data"]["validation"][0]), both)
    used: list[Row] = []
    original = fit.fit

    def spy(skill: Any, mixture: Any, validation: Any, *rest: Any, **named: Any) -> Any:
        used.extend(validation)
        return original(skill, mixture, validation, *rest, **named)

    monkeypatch.setattr(run, "fit", spy)
    run_recipe(make_recipe(values), tmp_path / "out")
    expected = [(r["task"], r["input"]) for r in both[2:]]
    assert sorted((r.task, r.input) for r in used) == sorted(expected)


# -- one step, however it is split -------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_same_for_any_micro_tokens(
    kind: str, lm: FrozenLM, encoder: Path, tmp_path: Path
) -> None:
    gradients = []
    for micro in (1, 60, 100_000):
        values = recipe_values(
            Path(lm.name), tmp_path / "data", prompt_spec(kind, encoder),
            steps=2, rows_per_step=6, micro_tokens=micro, clip=1e9,
        )  # fmt: skip
        skill = _fit(make_recipe(values), lm, tmp_path / f"{micro}")
        gradients.append({n: p.grad.clone() for n, p in skill.producer.named_parameters()})
        losses = [e["loss"] for e in _log(tmp_path / f"{micro}") if "loss" in e]
        assert losses == pytest.approx([7.0] * 2, abs=3)
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def test_order_is_reproducible_and_depends_on_the_seed(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    values = rows("north", 6)
    for row in values:
        row["targets"] = ["paris", "madrid", "no"]
    write_jsonl(Path(recipe.data.train[0]), values)

    def order(seed: int, start: int = 0) -> list[Example]:
        training = recipe.training.model_copy(update={"seed": seed})
        skill, mixture, _, _ = _parts(recipe.model_copy(update={"training": training}), lm)
        return [example_at(skill, mixture, i, seed) for i in range(start, 24)]

    assert order(0) == order(0)
    assert order(0)[10:] == order(0, start=10)  # position by position, without a history
    assert order(0) != order(1)
    assert len({tuple(e.answer_ids) for e in order(0)}) == 3  # every right answer is taught


def test_equal_seeds_give_equal_logs_and_weights(lm: FrozenLM, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_recipe(_recipe(lm, tmp_path, seed=seed), tmp_path / name)
    assert _log(tmp_path / "a") == _log(tmp_path / "b") != _log(tmp_path / "c")
    assert _tensors(tmp_path / "a") == _tensors(tmp_path / "b") != _tensors(tmp_path / "c")


# -- promise 8: it learns or it says so --------------------------------------------------


def test_it_learns(lm: FrozenLM, tmp_path: Path) -> None:
    # The last weights, not the best: two answers only, so that a static prompt can learn them.
    run_recipe(_recipe(lm, tmp_path, steps=30, optimizer={"lr": 0.1}), tmp_path / "out")
    losses = [entry["loss"] for entry in _log(tmp_path / "out") if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 2


def test_a_diverging_run_stops_and_saves_nothing(lm: FrozenLM, tmp_path: Path) -> None:
    values = recipe_values(
        Path(lm.name), tmp_path / "data", {"kind": "static_kv", "length": 4},
        optimizer={"lr": 1e37}, warmup_steps=0,
    )  # fmt: skip
    recipe = make_recipe(values)
    with pytest.raises(TrainingError, match=r"step [23]: loss is .*nan.*diverged; lower"):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize(
    ("steps", "every", "said"), [(1, 9, "'base' is not finite at the end"), (3, 1, "validation")]
)
def test_what_diverges_in_its_last_step_is_not_saved(
    steps: int, every: int, said: str, lm: FrozenLM, tmp_path: Path
) -> None:
    recipe = _recipe(lm, tmp_path, steps=steps, validate_every=every, optimizer={"lr": 1e39})
    if steps == 1:
        assert recipe.data is not None
        bare = recipe.data.model_copy(update={"validation": []})
        recipe = recipe.model_copy(update={"data": bare})
    with pytest.raises(DivergedError, match=f"{said}.*lower the learning rate"):
        run_recipe(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("skill.*"))
    assert not (tmp_path / "out" / checkpoint.FOLDER).exists()


def test_a_run_that_goes_on_is_not_asked_to_move_again(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a decay steps are smaller than numbers' precision: promise 5."""
    recipe = _recipe(lm, tmp_path, steps=6, save_every=1)
    _stopped(recipe, tmp_path / "out", 1, monkeypatch)
    monkeypatch.setattr(fit, "rate_factor", lambda *_: 1e-30)
    run_recipe(recipe, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / FILE).is_file()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_run_that_goes_on_is_asked_to_move_all_the_same(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    """Stopped before it was seen that nothing moves: promise 8 holds as undisturbed."""
    recipe = _recipe(lm, tmp_path, steps=6, save_every=1, optimizer={"lr": 1e-30})
    with pytest.raises(DivergedError, match="have not moved"):
        run_recipe(recipe, tmp_path / "whole")
    _stopped(recipe, tmp_path / "out", stopped, monkeypatch)
    with pytest.raises(DivergedError, match="have not moved"):
        run_recipe(recipe, tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / FILE).exists()


def test_what_has_nothing_to_train_is_refused(lm: FrozenLM, tmp_path: Path) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data", steps=3)
    values["skill"] = {"passes": [{"link": {"kind": "latent"}}, {}]}
    with pytest.raises(TrainingError, match="the recipe trains nothing"):
        run_recipe(make_recipe(values), tmp_path / "out")


def test_how_many_rows_select() -> None:
    """Of a single task as many as tell two checkpoints apart, of many a few each."""
    one = [Row("t", f"{i}", ("x",)) for i in range(500)]
    many = [Row(f"t{i % 50}", f"{i}", ("x",)) for i in range(1000)]
    few = [Row(f"t{i % 4}", f"{i}", ("x",)) for i in range(400)]
    assert [len(choose_rows(rows, None)) for rows in (one, many, few)] == [200, 400, 200]
    assert len(choose_rows(one, 8)) == 8


def test_a_folder_with_other_things_is_left_alone(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("my own")
    with pytest.raises(TrainingError, match=r"mine: is not empty \(README.md\); choose another"):
        run_recipe(recipe, tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "my own"


def test_rows_without_a_task_are_of_one_in_both_files(lm: FrozenLM, tmp_path: Path) -> None:
    """Else no validation row would be found among the training rows, or have their templates."""
    recipe = _recipe(lm, tmp_path)
    assert recipe.data is not None
    bare = [{k: v for k, v in row.items() if k != "task"} for row in rows("north", 4)]
    write_jsonl(Path(recipe.data.train[0]), bare)
    write_jsonl(Path(recipe.data.validation[0]), bare[:2])
    training, validation, _ = load_data(recipe.data)
    assert {row.task for row in (*training, *validation)} == {"train"}
    assert run.unseen_rows(validation, training) == []


def test_rows_of_several_files_are_seen_in_whichever_they_stand(
    lm: FrozenLM, tmp_path: Path
) -> None:
    recipe = _recipe(lm, tmp_path)
    assert recipe.data is not None
    bare = [{k: v for k, v in row.items() if k != "task"} for row in rows("north", 6)]
    files = [write_jsonl(tmp_path / f"{n}.jsonl", bare[n : n + 2]) for n in (0, 2)]
    data = recipe.data.model_copy(update={"train": [str(f) for f in files]})
    write_jsonl(Path(data.validation[0]), bare)
    training, validation, _ = load_data(data)
    left = run.unseen_rows(validation, training)
    assert [row.input for row in left] == [row["input"] for row in bare[4:]]
    # Of a task of its own the same input may well be another question.
    assert run.unseen_rows([Row("u", "x", ("b",))], [Row("t", "x", ("a",)), Row("u", "y", ("a",))])


def test_validation_rows_of_no_chosen_task_are_missed(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    assert recipe.data is not None
    trained = write_jsonl(tmp_path / "more.jsonl", rows("elsewhere", 2))
    train = [*recipe.data.train, str(trained)]
    data = recipe.data.model_copy(update={"tasks": ["elsewhere"], "train": train})
    with pytest.raises(DataError, match=r"no row of the tasks that data\.tasks and data\.exclude"):
        load_data(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_before_the_step(
    bad: float, lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skill, mixture, _, templates = _parts(_recipe(lm, tmp_path), lm)
    before = fit.copied(skill.producer)
    monkeypatch.setattr(
        step, "answer_losses", lambda *given, **how: answer_losses(*given, **how) * bad
    )
    with pytest.raises(TrainingError, match=r"step 1: loss is (nan|inf)"):
        fit.fit(skill, mixture, [], templates, _recipe(lm, tmp_path), tmp_path / "out")
    assert all(torch.equal(before[n], v) for n, v in fit.copied(skill.producer).items())


def test_a_tensor_without_gradient_is_named(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    skill, mixture, _, templates = _parts(recipe, lm)
    _module(skill).register_parameter("forgotten", nn.Parameter(torch.ones(3)))
    with pytest.raises(TrainingError, match="not moved: forgotten;"):
        fit.fit(skill, mixture, [], templates, recipe, tmp_path / "out")


def test_a_rate_too_small_to_move_anything_is_reported(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path, optimizer={"lr": 1e-20})
    with pytest.raises(TrainingError, match="not moved: base;"):
        run_recipe(recipe, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_every_producer_moves(
    kind: str, lm: FrozenLM, encoder: Path, tmp_path: Path
) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data", prompt_spec(kind, encoder), steps=3)
    recipe = make_recipe(values)
    skill, mixture, _, templates = _parts(recipe, lm)
    before = fit.copied(skill.producer)
    fit.fit(skill, mixture, [], templates, recipe, tmp_path / "out")
    assert skill.producer is not None
    for name, parameter in skill.producer.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_recipe_without_a_prompt_trains_nothing(lm: FrozenLM, tmp_path: Path) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data")
    values["skill"] = {"passes": [{"prompt": None}]}
    with pytest.raises(RecipeError, match="trains nothing"):
        make_recipe(values)


def test_an_unknown_part_of_lr_for_is_named() -> None:
    named = [("base", nn.Parameter(torch.ones(2))), ("project.bias", nn.Parameter(torch.ones(2)))]
    config = OptimizerConfig(lr=1.0, lr_for={"projekt": 0.1})
    with pytest.raises(RecipeError, match=r"lr_for\.projekt: .*base, project"):
        make_optimizer(named, config)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "muon"])
def test_the_longest_prefix_of_lr_for_wins(kind: Any) -> None:
    names = ("base", "generator.read.weight", "generator.queries")
    named = [(name, nn.Parameter(torch.ones(2))) for name in names]
    config = OptimizerConfig(kind=kind, lr=1.0, lr_for={"generator": 0.1, "generator.read": 0.2})
    optimizer = make_optimizer(named, config)
    assert [g["peak_lr"] for g in optimizer.param_groups] == [1.0, 0.2, 0.1]


def test_learning_rate_schedule() -> None:
    def factors(**settings: Any) -> list[float]:
        config = TrainingConfig(steps=10, optimizer=OptimizerConfig(lr=1), **settings)
        return [rate_factor(step, config) for step in range(10)]

    up = [0.25, 0.5, 0.75, 1.0]
    assert factors(warmup_steps=4, decay="constant") == up + [1.0] * 6
    assert factors(warmup_steps=4, decay="linear") == pytest.approx(
        [*up, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    )
    assert factors(warmup_steps=4, decay="cosine") == pytest.approx(
        [*up, 1.0, 0.933012702, 0.75, 0.5, 0.25, 0.066987298]
    )
    assert factors(warmup_steps=0, decay="linear")[0] == 1.0
    assert factors(warmup_steps=20, decay="linear") == [(i + 1) / 20 for i in range(10)]


def test_the_schedule_and_the_part_rates_reach_the_optimizer(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []

    def spy(*given: Any) -> torch.optim.Optimizer:
        optimizer = make_optimizer(*given)
        optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(fit, "make_optimizer", spy)
    _fit(_recipe(lm, tmp_path, optimizer={"lr": 1, "lr_for": {"base": 0.01}}), lm, tmp_path / "o")
    assert used == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    assert [100 * e["lr_factor"] for e in _log(tmp_path / "o") if "loss" in e] == pytest.approx(
        [1e4 * rate for rate in used]
    )


# -- selection ---------------------------------------------------------------------------


def test_without_a_console_nothing_is_said(
    lm: FrozenLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    run_recipe(_recipe(lm, tmp_path), tmp_path / "out")
    assert capsys.readouterr() == ("", "")


def test_answers_cannot_select_where_no_rows_are_left(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path, select="exact_match")
    assert recipe.data is not None
    seen = recipe.data.model_copy(update={"validation": recipe.data.train})
    with pytest.raises(TrainingError, match=r"training\.select: exact_match needs validation"):
        run_recipe(recipe.model_copy(update={"data": seen}), tmp_path / "out")


def test_a_checkpoint_is_bound_to_its_encoders(lm: FrozenLM, tmp_path: Path) -> None:
    """Where it noted them: earlier versions did not."""
    recipe = _recipe(lm, tmp_path).model_dump(mode="json")
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    weights = dict(module.named_parameters())
    noted = {"recipe": recipe, "lm": "a", "encoders": ["b"]}
    save_checkpoint(tmp_path / "new", Progress(step=1), weights, {}, optimizer, noted)
    assert load_checkpoint(tmp_path / "new", optimizer, noted)
    with pytest.raises(TrainingError, match=r"encoders was \['b'\], is \['c'\]"):
        load_checkpoint(tmp_path / "new", optimizer, {**noted, "encoders": ["c"]})
    earlier = {"recipe": recipe, "lm": "a"}
    save_checkpoint(tmp_path / "old", Progress(step=1), weights, {}, optimizer, earlier)
    assert load_checkpoint(tmp_path / "old", optimizer, noted)


@pytest.mark.parametrize(
    ("select", "results", "best"),
    [
        ("loss", [3.0, 1.0, 2.0], 4),
        ("loss", [1.0, 1.0, 2.0], 2),
        ("exact_match", [5, 9, 0], 4),
        ("last", [1.0, 2.0, 3.0], 6),
    ],
)
def test_the_best_weights_are_saved(
    select: str,
    results: list[float],
    best: int,
    lm: FrozenLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[torch.Tensor] = []

    def fake(skill: Skill, *_: Any) -> dict[str, float]:
        seen.append(_module(skill).get_parameter("base").detach().clone())
        return {"loss": 0.0, select: float(results[len(seen) - 1])}

    monkeypatch.setattr(fit, "validate", fake)
    recipe = _recipe(lm, tmp_path, validate_every=2, select=select)
    shown = io.StringIO()
    run_recipe(recipe, tmp_path / "out", console=Console(file=shown, width=200))
    said = f"keeping step {best}, of the lowest loss" in shown.getvalue()
    assert capsys.readouterr() == ("", "")
    assert said == (select == "loss")  # in both cases above a later step is not kept
    loaded, _ = load_skill(tmp_path / "out", lm, load_encoder)
    assert torch.equal(_module(loaded).get_parameter("base"), seen[best // 2 - 1])
    provenance = json.loads((tmp_path / "out" / FILE).read_text())["provenance"]
    assert provenance["best_step"] == best
    assert provenance["steps"] == 6
    assert [v[select] for v in provenance["validations"]] == results


def test_without_validation_the_last_weights_are_saved(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    data = recipe.data.model_copy(update={"validation": []})
    run_recipe(recipe.model_copy(update={"data": data}), tmp_path / "out")
    saved, _ = load_skill(tmp_path / "out", lm, load_encoder)
    state = next((tmp_path / "out" / "checkpoints").iterdir())
    last = checkpoint.load_file(state / "state.safetensors")["model.base"]
    assert torch.equal(_module(saved).get_parameter("base"), last)


@pytest.mark.parametrize("select", ["loss", "exact_match"])
def test_validation_loss_is_averaged_by_task(select: str, lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path, steps=1, select=select)
    write_jsonl(Path(recipe.data.validation[0]), [*rows("north", 3, 50), *rows("south", 1, 50)])
    skill, mixture, validation, templates = _parts(recipe, lm)
    progress = fit.fit(skill, mixture, validation, templates, recipe, tmp_path / "out")
    examples = [example_of(skill, r, templates.render(r, 0), 0) for r in validation]
    with torch.no_grad():
        losses = _reference(lm, skill.prompt([e.text for e in examples]), examples)
    means = [float(loss.mean()) for loss in losses]
    expected = (sum(means[:3]) / 3 + means[3]) / 2
    assert progress.validations[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert ("exact_match" in progress.validations[0]) == (select == "exact_match")


# -- the LM stays as it is ---------------------------------------------------------------


def test_the_lm_is_unchanged(lm: FrozenLM, tmp_path: Path) -> None:
    ids = torch.arange(20)[None]
    digest, logits = lm.digest(), lm.model(input_ids=ids).logits
    run_recipe(_recipe(lm, tmp_path), tmp_path / "out")
    assert lm.digest() == digest
    assert torch.equal(lm.model(input_ids=ids).logits, logits)
    assert all(p.grad is None for p in lm.model.parameters())
    provenance = json.loads((tmp_path / "out" / FILE).read_text())["provenance"]
    assert provenance["lm_digest"] == digest


def test_a_changed_lm_is_noticed_and_nothing_saved(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fit.fit
    weight = next(lm.model.parameters())
    value = weight.data[0, 0].clone()

    def meddle(*given: Any, **named: Any) -> Any:
        weight.data[0, 0] += 1e-6
        return original(*given, **named)

    monkeypatch.setattr(run, "fit", meddle)
    try:
        with pytest.raises(TrainingError, match="frozen LM changed"):
            run_recipe(_recipe(lm, tmp_path), tmp_path / "out")
    finally:
        weight.data[0, 0] = value
    assert not (tmp_path / "out" / FILE).exists()


# -- promise 5: resuming, within one process ---------------------------------------------


def _stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C during the step after `step` steps, once."""
    pressed: list[int] = []

    def press(now: int, config: TrainingConfig) -> float:
        if now == step and not pressed:
            pressed.append(now)
            os.kill(os.getpid(), signal.SIGINT)
        return rate_factor(now, config)

    monkeypatch.setattr(fit, "rate_factor", press)


def _stopped(recipe: Recipe, out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_at(step, monkeypatch)
    with pytest.raises(
        InterruptedTraining, match=f"stopped at step {step + 1}; go on with --resume"
    ):
        run_recipe(recipe, out)
    assert not (out / FILE).exists()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, 3, 4])
def test_a_stopped_run_resumes_bit_for_bit(
    step: int, optimizer: str, lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(lm, tmp_path, optimizer=OPTIMIZERS[optimizer], save_every=100)
    run_recipe(recipe, tmp_path / "whole")
    _stopped(recipe, tmp_path / "parts", step, monkeypatch)
    run_recipe(recipe, tmp_path / "parts", resume=True)
    assert _tensors(tmp_path / "parts") == _tensors(tmp_path / "whole")
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")
    kept = [json.loads((tmp_path / n / FILE).read_text()) for n in ("parts", "whole")]
    for key in ("best_step", "steps", "validations"):
        assert kept[0]["provenance"][key] == kept[1]["provenance"][key]


@pytest.mark.parametrize("kind", KINDS)
def test_every_producer_resumes_bit_for_bit(
    kind: str, lm: FrozenLM, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe_values(Path(lm.name), tmp_path / "data", prompt_spec(kind, encoder), steps=5)
    recipe = make_recipe(values)
    run_recipe(recipe, tmp_path / "whole")
    _stopped(recipe, tmp_path / "parts", 2, monkeypatch)
    run_recipe(recipe, tmp_path / "parts", resume=True)
    assert _tensors(tmp_path / "parts") == _tensors(tmp_path / "whole")
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")


def test_the_best_weights_survive_a_resume(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = iter([{"loss": v} for v in (1.0, 2.0, 3.0)])
    monkeypatch.setattr(fit, "validate", lambda *_: next(results))
    recipe = _recipe(lm, tmp_path, validate_every=2)
    _stopped(recipe, tmp_path / "out", 4, monkeypatch)
    run_recipe(recipe, tmp_path / "out", resume=True)
    provenance = json.loads((tmp_path / "out" / FILE).read_text())["provenance"]
    assert provenance["best_step"] == 2
    results = iter([{"loss": v} for v in (1.0, 2.0, 3.0)])
    run_recipe(recipe, tmp_path / "whole")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_an_unfinished_run_is_not_started_over(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(lm, tmp_path)
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    with pytest.raises(TrainingError, match="unfinished run; add --resume"):
        run_recipe(recipe, tmp_path / "out")
    run_recipe(recipe, tmp_path / "out", resume=True)
    for resume in (False, True):
        with pytest.raises(TrainingError, match="already holds a finished skill"):
            run_recipe(recipe, tmp_path / "out", resume=resume)


def test_resume_without_a_checkpoint_starts(lm: FrozenLM, tmp_path: Path) -> None:
    run_recipe(_recipe(lm, tmp_path), tmp_path / "out", resume=True)
    run_recipe(_recipe(lm, tmp_path), tmp_path / "whole")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_resuming_with_another_recipe_names_the_key(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(lm, tmp_path)
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    other = _recipe(lm, tmp_path, optimizer={"kind": "adamw", "lr": 0.02})
    with pytest.raises(TrainingError, match=r"training\.optimizer\.lr was 0\.01, is 0\.02"):
        run_recipe(other, tmp_path / "out", resume=True)
    values = recipe_values(Path(lm.name), tmp_path / "data", {"kind": "static", "length": 5})
    with pytest.raises(TrainingError, match=r"recipe\.skill\.passes was .*4.* is .*5"):
        run_recipe(make_recipe(values), tmp_path / "out", resume=True)


def test_runs_of_earlier_versions_resume(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that a recipe did not have when the run began stand at their defaults."""
    recipe = _recipe(lm, tmp_path)
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    (file,) = (tmp_path / "out/checkpoints").glob("*/state.json")
    noted = json.loads(file.read_text())
    del noted["recipe"]["recipe"]["members"], noted["recipe"]["recipe"]["data"]["seed"]
    file.write_text(json.dumps(noted))
    assert recipe.data is not None
    eight = recipe.data.model_copy(update={"examples": 8})
    other = recipe.model_copy(update={"data": eight})
    with pytest.raises(TrainingError, match=r"recipe\.data\.examples was None, is 8"):
        run_recipe(other, tmp_path / "out", resume=True)
    run_recipe(recipe, tmp_path / "out", resume=True)
    same_recipe(recipe, tmp_path / "recipe.json", {})
    noted = json.loads((tmp_path / "recipe.json").read_text())
    del noted["members"]
    (tmp_path / "recipe.json").write_text(json.dumps(noted))
    same_recipe(recipe, tmp_path / "recipe.json", {})


def test_a_run_resumes_where_its_data_has_moved(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a project, or a comparison's plan, was moved: the rows' hashes are what counts."""
    recipe = _recipe(lm, tmp_path)
    run_recipe(recipe, tmp_path / "whole")
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    same_recipe(recipe, tmp_path / "recipe.json", {})
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert recipe.data is not None
    places = recipe.data.model_dump()
    for key in ("train", "validation"):
        places[key] = [str(tmp_path / "elsewhere" / Path(name).name) for name in places[key]]
    moved = recipe.model_copy(update={"data": recipe.data.model_copy(update=places)})
    same_recipe(moved, tmp_path / "recipe.json", {})
    run_recipe(moved, tmp_path / "out", resume=True)
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_a_row_that_will_not_fit_is_named_before_the_first_step(
    lm: FrozenLM, tmp_path: Path
) -> None:
    recipe = _recipe(lm, tmp_path, steps=200)
    late = {"task": "north", "input": "z " * 400, "targets": ["no"]}
    write_jsonl(tmp_path / "data/train.jsonl", [*rows("north", 9), late, *rows("south", 5)])
    with pytest.raises(WindowError, match=r"train.jsonl:10, task 'north' \('z z .*tokens, \d+ fit"):
        run_recipe(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("checkpoints/*"))
    skill, mixture, *_ = _parts(recipe, lm)
    first = next(i for i in range(800) if mixture.example(i)[0].input.startswith("z"))
    check_window(skill, mixture, range(first), 0)  # one that is not drawn does not matter
    with pytest.raises(WindowError):
        check_window(skill, mixture, range(first + 1), 0)


def test_one_training_at_a_time_writes_into_a_folder(lm: FrozenLM, tmp_path: Path) -> None:
    recipe = _recipe(lm, tmp_path)
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(ShouldersError, match="another process writes there"),
    ):
        run_recipe(recipe, tmp_path / "out")
    assert run_recipe(recipe, str(tmp_path / "out")) is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr": 0.1, "lr_for": {"base": -1}}, "lr_for.base"),
        ({"lr": 0.1, "lr_for": {"base": float("nan")}}, "lr_for.base"),
        ({"lr": 0.1, "betas": [1.5, 0.9]}, "betas.0"),
        ({"lr": 0.1, "betas": [0.9]}, "betas"),
        ({"lr": 0.1, "weight_decay": float("inf")}, "weight_decay"),
    ],
)
def test_rates_that_train_uphill_or_nowhere_are_refused(
    settings: dict[str, Any], said: str, lm: FrozenLM, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        _recipe(lm, tmp_path, optimizer=settings)


def test_a_seed_is_a_number_that_torch_takes(lm: FrozenLM, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="seed"):
        _recipe(lm, tmp_path, seed=2**70)


def test_files_that_end_alike_have_a_hash_each(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{part}/rows.jsonl", rows(part, 2)) for part in "ab"]
    names = [*map(str, files), str(write_jsonl(tmp_path / "other.jsonl", rows("c", 1)))]
    found = run.hashes_of(names)
    assert list(found) == ["rows.jsonl", "rows.jsonl#2", "other.jsonl"]
    assert len(set(found.values())) == 3


def test_resuming_on_other_data_or_another_lm_is_refused(
    lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(lm.name, tmp_path / "lm"))
    recipe = make_recipe(recipe_values(folder, tmp_path / "data"))
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    train = Path(recipe.data.train[0])
    before = train.read_bytes()
    write_jsonl(train, rows("north", 10))
    with pytest.raises(TrainingError, match=r"data\.train\.jsonl was"):
        run_recipe(recipe, tmp_path / "out", resume=True)
    train.write_bytes(before)
    save_tiny_lm(folder, seed=1)
    with pytest.raises(TrainingError, match=r"\(lm was '[0-9a-f]{64}', is '[0-9a-f]{64}'\)"):
        run_recipe(recipe, tmp_path / "out", resume=True)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-50])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _drop(file: Path, key: str) -> None:
    values = json.loads(file.read_text())
    del values[key]
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("state.safetensors", _cut),
        ("state.safetensors", _flip),
        ("state.safetensors", Path.unlink),
        ("state.json", _cut),
        ("state.json", Path.unlink),
        ("state.json", lambda f: f.write_text("[]")),
        ("state.json", lambda f: _drop(f, "recipe")),
        ("state.json", lambda f: _drop(f, "progress")),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    name: str,
    spoil: Callable[[Path], object],
    lm: FrozenLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = _recipe(lm, tmp_path)
    _stopped(recipe, tmp_path / "out", 3, monkeypatch)
    spoil(tmp_path / "out" / "checkpoints" / "step-0000004" / name)
    with pytest.raises(ArtefactError, match="step-0000004: "):
        run_recipe(recipe, tmp_path / "out", resume=True)
    assert not (tmp_path / "out" / FILE).exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), checkpoint.SafetensorError("28")])
def test_a_full_disk_in_a_checkpoint_keeps_the_one_before(
    error: Exception, lm: FrozenLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(lm, tmp_path)
    original, calls = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        original(tensors, path)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ShouldersError, match="step-0000004: cannot write"):
        run_recipe(recipe, tmp_path / "out")
    left = {p.name for p in (tmp_path / "out" / "checkpoints").iterdir()}
    assert left == {"step-0000002"}
    run_recipe(recipe, tmp_path / "out", resume=True)
    run_recipe(recipe, tmp_path / "whole")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_a_second_interrupt_stops_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


# -- promise 5: killed at any moment, in other processes ---------------------------------


@pytest.mark.parametrize(
    ("optimizer", "kills"),
    [
        ("adamw", 3),
        pytest.param("adamw", 20, marks=pytest.mark.slow),
        pytest.param("adafactor", 20, marks=pytest.mark.slow),
        pytest.param("muon", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_as_if_never_killed(
    optimizer: str, kills: int, lm: FrozenLM, folder: Path, tmp_path: Path
) -> None:
    """SIGKILL at random moments, resume, compare; at last Ctrl-C by signal (exit 130)."""
    values = recipe_values(
        Path(lm.name), tmp_path / "data", optimizer=OPTIMIZERS[optimizer], steps=16
    )
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    done = subprocess.run(
        [sys.executable, __file__, str(recipe), str(tmp_path / "runs"), str(kills)],
        env=environment(folder / "cache"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["killed"] >= kills, report
    assert report["inside"] >= 1, report  # at least one kill in the middle of training
    assert report["interrupted"] == 130, report
    assert set(report["finished"]) == {0}, report
    whole = tmp_path / "runs" / "whole"
    for other in ("parts", "stopped"):
        assert _tensors(tmp_path / "runs" / other) == _tensors(whole)
        assert _log(tmp_path / "runs" / other) == _log(whole)


def _start(recipe: str, out: Path, *more: str) -> int:
    """Fork a process that runs `shoulders train`, and return its id.

    Forked from one that has imported everything, so that twenty runs take seconds.
    """
    process = os.fork()
    if process:
        return process
    from shoulders.cli.app import main

    sys.argv = ["shoulders", "train", recipe, "--out", str(out), *more]
    code = 1
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait_for(process: int, log: Path, lines: int) -> bool:
    """Wait until the log has that many lines; False when the process ended before."""
    while not log.exists() or log.read_bytes().count(b"\n") < lines:
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    return True


def _exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _main(recipe: str, folder: str, kills: str) -> None:
    torch.set_num_threads(1)
    chance = random.Random(int(kills))
    whole, parts = Path(folder) / "whole", Path(folder) / "parts"
    log = parts / "log.jsonl"
    finished = [_exit_code(_start(recipe, whole))]
    killed = inside = 0
    while killed < int(kills):
        if (parts / FILE).exists():  # ended before a kill: begin again
            shutil.rmtree(parts)
        before = log.read_bytes().count(b"\n") if log.exists() else 0
        process = _start(recipe, parts, "--resume")
        if chance.random() < 0.8:  # in training, soon after some step...
            alive = _wait_for(process, log, chance.randint(1, 3) + before)
            time.sleep(chance.random() * 0.02)
        else:  # ... or at any moment, while loading as well
            alive = True
            time.sleep(chance.random() * 0.4)
        if not alive:
            continue
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
            killed += 1
            inside += log.exists() and not (parts / FILE).exists() and log.stat().st_size > 0
    if not (parts / FILE).exists():
        finished.append(_exit_code(_start(recipe, parts, "--resume")))
    # Ctrl-C, in a run of its own: early in training, so that the signal cannot come too late.
    stopped = Path(folder) / "stopped"
    process = _start(recipe, stopped)
    _wait_for(process, stopped / "log.jsonl", 2)
    os.kill(process, signal.SIGINT)
    interrupted = _exit_code(process)
    finished.append(_exit_code(_start(recipe, stopped, "--resume")))
    report = {
        "killed": killed, "inside": inside, "interrupted": interrupted, "finished": finished
    }  # fmt: skip
    sys.stdout.write("\n" + json.dumps(report) + "\n")


if __name__ == "__main__":
    _main(*sys.argv[1:])


def test_parts_come_from_the_recipes_that_name_them(lm: FrozenLM, tmp_path: Path) -> None:
    """Neither from another recipe of the same name, nor from one that has changed since."""
    values = recipe_values(Path(lm.name), tmp_path / "data", {"kind": "static", "length": 4})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_recipe(tmp_path / folder / "part.yaml", values)
    part, out = str(tmp_path / "a/part.yaml"), tmp_path / "out"

    def train(recipe: Recipe, folder: Path) -> object:
        return run_recipe(recipe, folder)

    twice = {"passes.0.prompt": part, "passes.1.prompt": str(tmp_path / "b/part.yaml")}
    with pytest.raises(RecipeError, match="are trained into one folder"):
        trained_parts(twice, out, train, None)
    assert not out.exists()
    start = {"passes.0.prompt": part}
    folders = trained_parts(start, out, train, None)
    assert trained_parts(start, out, train, None) == folders  # as it is, it is taken
    values["training"]["steps"] = 5
    write_recipe(Path(part), values)
    with pytest.raises(TrainingError, match=r"was trained by another recipe .*steps"):
        trained_parts(start, out, train, None)
