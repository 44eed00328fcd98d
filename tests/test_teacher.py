"""Learning from a teacher: its distribution at the answers, against full logits of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoulders.errors import RecipeError, TrainingError
from shoulders.lm import states
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.lm.prompt import Prompt
from shoulders.skills.artefact import read_artefact
from shoulders.training.configs import LMConfig, TeacherConfig
from shoulders.training.objective import Example, answer_losses
from shoulders.training.recipe import make_recipe
from shoulders.training.run import run_recipe
from shoulders.training.teacher import Teacher
from tiny_models import recipe_values, save_tiny_lm

EXAMPLES = [
    Example("a", [5, 6, 7], [40, 41, 0], "t"),
    Example("b", [9], [50, 0], "t"),
    Example("c", [11, 12, 13, 14, 15, 16, 17, 18], [60], "u"),
]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Return an LM, and another of the same tokenizer that teaches."""
    monkeypatch.setenv("SHOULDERS_CACHE", str(tmp_path / "cache"))
    return save_tiny_lm(tmp_path / "lm"), save_tiny_lm(tmp_path / "teacher", seed=1, layers=3)


def full_logits(lm: FrozenLM, example: Example, vectors: Tensor | None = None) -> Tensor:
    """Return the whole model's logits at the places that predict the answer, `[n, vocabulary]`."""
    embedded = lm.model.get_input_embeddings()(torch.tensor(example.read_ids))
    if vectors is not None:
        embedded = torch.cat([vectors, embedded])
    logits: Tensor = lm.model(inputs_embeds=embedded[None]).logits[0].float()
    return logits[-len(example.answer_ids) :]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_losses_and_gradients_are_those_of_the_mixture(
    weight: float, packed: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, teacher = (load_lm(str(f), dtype="float32") for f in folders)
    if not packed:
        monkeypatch.setattr(states, "can_pack", lambda *_: False)
    drawn = torch.Generator().manual_seed(0)
    start = torch.randn(len(EXAMPLES), 3, lm.hidden_size, generator=drawn)
    ours, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    taught = Teacher(teacher, weight, top=10_000).teach(EXAMPLES)  # more than there are: all

    found = answer_losses(lm, Prompt.of_vectors(ours), taught)
    expected = []
    for i, example in enumerate(EXAMPLES):
        with torch.no_grad():
            wanted = weight * full_logits(teacher, example).softmax(-1)
        wanted[range(len(wanted)), example.answer_ids] += 1 - weight
        expected.append(-(wanted * full_logits(lm, example, plain[i]).log_softmax(-1)).sum(-1))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-5)
    found.sum().backward()
    torch.cat(expected).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad, atol=1e-4, rtol=1e-4)


def test_the_likeliest_tokens_stand_for_all(folders: tuple[Path, Path]) -> None:
    teacher = load_lm(str(folders[1]), dtype="float32")
    (first, *_), logits = Teacher(teacher, 0.5, top=4).teach(EXAMPLES), full_logits
    assert first.lesson is not None
    with torch.no_grad():
        top = logits(teacher, EXAMPLES[0]).softmax(-1).topk(4)
    assert torch.equal(first.lesson.ids, top.indices)
    torch.testing.assert_close(
        first.lesson.probabilities, top.values / top.values.sum(1, keepdim=True)
    )


def with_teacher(lm: Path, teacher: Path, data: Path, **settings: Any) -> dict[str, Any]:
    values = recipe_values(lm, data)
    spec = {"lm": {"name": str(teacher), "dtype": "float32"}, **settings}
    values["training"]["teacher"] = spec
    return values


def test_a_student_comes_nearer_to_its_teacher(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lm, teacher = folders
    values = with_teacher(lm, teacher, tmp_path / "data", weight=1.0)
    values["training"] |= {"steps": 60, "optimizer": {"lr": 0.05}, "validate_every": 60}
    digest = load_lm(str(teacher), dtype="float32").digest()
    skill = run_recipe(make_recipe(values), tmp_path / "out")
    tutor = Teacher.of(TeacherConfig(lm=LMConfig(name=str(teacher), dtype="float32")), skill.lm)
    assert tutor.lm.digest() == digest

    taught = [replace(e, text=f"north question {i}") for i, e in enumerate(EXAMPLES)]
    taught = Teacher(tutor.lm, 1.0, top=10_000).teach(taught)
    with torch.no_grad():
        after = answer_losses(skill.lm, skill.prompt([e.text for e in taught]), taught).mean()
        before = answer_losses(skill.lm, Prompt.empty(len(taught)), taught).mean()
    assert after < before - 0.1


def test_validation_asks_for_the_answers_alone(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, teacher = folders
    values = with_teacher(lm, teacher, tmp_path / "data")
    values["training"] |= {"steps": 3, "validate_every": 3, "optimizer": {"lr": 1e-9}}
    alone = recipe_values(lm, tmp_path / "data")
    alone["training"] |= {"steps": 3, "validate_every": 3, "optimizer": {"lr": 1e-9}}
    losses = []
    monkeypatch.setattr("shoulders.training.fit.check_moved", lambda *_: None)
    for name, given in (("taught", values), ("alone", alone)):
        run_recipe(make_recipe(given), tmp_path / name)
        log = read_artefact(tmp_path / name).provenance["validations"]
        losses.append(log[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_another_teacher_does_not_go_on(folders: tuple[Path, Path], tmp_path: Path) -> None:
    lm, teacher = folders
    out = tmp_path / "out"
    values = with_teacher(lm, teacher, tmp_path / "data")
    run_recipe(make_recipe(values), out)
    fingerprint = load_lm(str(teacher), dtype="float32").fingerprint
    assert read_artefact(out).provenance["teacher"] == fingerprint
    (out / "skill.json").unlink()
    assert run_recipe(make_recipe(values), out, resume=True) is not None
    (out / "skill.json").unlink()
    save_tiny_lm(teacher, seed=2)  # the same name, other weights
    with pytest.raises(TrainingError, match="teacher"):
        run_recipe(make_recipe(values), out, resume=True)


def test_a_teacher_of_other_tokens_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = save_tiny_lm(tmp_path / "other", tokenizer_extra="jabberwocky burbled galumphing")
    values = with_teacher(folders[0], other, tmp_path / "data")
    with pytest.raises(TrainingError, match="another tokenizer"):
        run_recipe(make_recipe(values), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "said"), [({"weight": 0}, "weight"), ({"top": 0}, "top"), ({"topp": 3}, "topp")]
)
def test_wrong_settings_name_their_key(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = with_teacher(tmp_path, tmp_path, tmp_path / "data", **settings)
    with pytest.raises(RecipeError, match=said):
        make_recipe(values)
