"""Recipes: one YAML file that says which LM, which skill, which data and how to train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoulders.data.mixture import MixtureConfig
from shoulders.data.yaml_loader import NO_YAML, read_yaml
from shoulders.errors import RecipeError, nearest
from shoulders.prompts.build import kind_of, rates_of
from shoulders.skills.config import SkillConfig
from shoulders.training.configs import CrossFitConfig, LMConfig, RunningTextConfig, TrainingConfig
from shoulders.training.keys import explain, override

FILES = ("train", "validation", "templates")  # what `data` and `text` name files by


class Recipe(BaseModel):
    """A whole training run.

    Attributes:
        lm: what stays frozen.
        skill: what is trained around it.
        data: tasks to train on; or
        text: running text (for a link: the Connector's pretraining).
        start: parts (`passes.0.link`, `passes.1.prompt`) that begin at those of another skill: its
            folder, or a recipe that is trained first.
        cross_fit: for a skill whose first passes propose text.
        members: more than one trains an ensemble of so many skills that answer together
            (`shoulders.skills.ensemble`). Each has a seed of its own, for its random initial values
            and the order of what it reads: `data.examples` are the same ones for all members,
            without it each draws its own.
        training: how. Without an `optimizer`, a skill of one pass is trained at the rates that its
            producer begins with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMConfig = LMConfig()
    skill: SkillConfig
    data: MixtureConfig | None = None
    text: RunningTextConfig | None = None
    start: dict[str, str] = {}
    cross_fit: CrossFitConfig | None = None
    members: int = Field(default=1, ge=1)
    training: TrainingConfig

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Self:
        if (self.data is None) == (self.text is None):
            raise ValueError("give either data (tasks) or text (running text) to train on")
        if self.text is not None and self.training.select == "exact_match":
            raise ValueError("training.select: running text has no answers; use loss or last")
        if self.training.select == "exact_match" and self.data and not self.data.validation:
            raise ValueError(
                "training.select: exact_match needs rows to select on: data.validation"
            )
        parts = {
            f"passes.{number}.{kind}": number
            for number, one in enumerate(self.skill.passes)
            for kind in ("prompt", "link")
            if getattr(one, kind) not in (None, "same")
        }
        if not any(number in self.skill.stage for number in parts.values()):
            raise ValueError("the recipe trains nothing: give its last pass a prompt")
        for part in self.start:
            if part not in parts:
                raise ValueError(f"start.{part}: the skill has no such part{nearest(part, parts)}")
        proposing = self.skill.before_text() is not None
        if proposing and (self.cross_fit is None or self.data is None):
            raise ValueError(
                "a pass proposes text: the next one is trained on data and needs cross_fit"
            )
        if not proposing and self.cross_fit is not None:
            raise ValueError("cross_fit is for skills with a pass that proposes text")
        if proposing and "passes.0.prompt" not in self.start:
            raise ValueError(
                "start.passes.0.prompt is missing: the recipe, or the folder, of the first pass"
            )
        if self.training.shard_lm and len(self.skill.passes) > 1:
            raise ValueError("training.shard_lm is for skills of one pass; this has several")
        stage = [self.skill.passes[number] for number in self.skill.stage]
        if self.training.remember_first_pass and (len(stage) < 2 or stage[0].prompt is not None):
            raise ValueError(
                "training.remember_first_pass is for skills of several passes, the first of which "
                "has no prompt: its states never change"
            )
        if self.members > 1 and len(self.skill.passes) > 1:
            raise ValueError("members: an ensemble is of skills of one pass; this has several")
        return self


def read_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Paths in `data` are looked up beside the recipe first, then in the working folder.

    Raises:
        RecipeError: names the file, the key and, for an unknown key, the nearest valid one.
    """
    path = Path(path)
    values = read_values(path, overrides)
    if "reader" in values:
        raise RecipeError(
            f"{path}: a reader's recipe, which trains more than a skill: use `shoulders train`, or "
            "read_reader_recipe and run_reader_recipe of shoulders.training"
        )
    recipe = make_recipe(values, str(path))
    folder = path.parent
    updates: dict[str, Any] = {
        "start": {part: located(name, folder) for part, name in recipe.start.items()}
    }
    if recipe.data is not None:
        updates["data"] = _located(recipe.data, folder)
    if recipe.text is not None:
        files = {split: getattr(recipe.text, split) for split in ("train", "validation")}
        updates["text"] = recipe.text.model_copy(
            update={split: [located(n, folder) for n in names] for split, names in files.items()}
        )
    recipe = recipe.model_copy(update=updates)
    if recipe.text is not None:  # again: what had two names may have one path
        try:
            RunningTextConfig.model_validate(recipe.text.model_dump())
        except ValidationError as error:
            raise RecipeError(f"{path}: text: {error.errors()[0]['msg']}") from error
    return recipe


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a recipe file says, overridden, and not yet validated; raises `RecipeError`."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except NO_YAML as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with lm, skill, data and training")
    rates = [one for one in overrides if one.startswith("training.optimizer.")]
    for one in overrides:
        if one not in rates:
            override(values, one)
    if rates:  # one of a producer's own is changed, where the recipe names no others
        try:
            values = with_rates(values)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error
    for one in rates:
        override(values, one)
    return values


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as nested mappings; raises `RecipeError` naming `where`."""
    try:
        return Recipe.model_validate(with_rates(values))
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, Recipe, values)}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def as_now(noted: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return what a run has noted of its recipe as this version notes it.

    What an earlier version did not have yet stands at its default; other keys stay.
    """
    own = {key: value for key, value in noted.items() if key in model.model_fields}
    try:
        return {**noted, **model.model_validate(own).model_dump(mode="json")}
    except (ValidationError, RecipeError):  # it cannot be one now: it will be found to differ
        return noted


def by_name(noted: dict[str, Any]) -> dict[str, Any]:
    """Return a noted recipe with the names of its data files in place of their paths.

    For runs that note the hashes of those files as well: a folder may move, its rows not change.
    """
    changed = dict(noted)
    for part in ("data", "text"):
        own = noted.get(part)
        if isinstance(own, dict):
            files = {key: _names(own[key]) for key in FILES if key in own}
            changed[part] = {**own, **files}
    return changed


def _names(value: Any) -> Any:
    if isinstance(value, list):
        return [_names(one) for one in value]
    return Path(value).name if isinstance(value, str) else value


def with_rates(values: dict[str, Any]) -> dict[str, Any]:
    """Return what a recipe says, with its producer's own learning rates where it names none.

    Only for skills of one pass: what several passes train together has no rates of its own.
    """
    match values:
        case {"skill": {"passes": [{"prompt": dict(prompt)}]}, "training": dict(training)}:
            if "optimizer" not in training and (rates := rates_of(kind_of(prompt))) is not None:
                return {**values, "training": {**training, "optimizer": copy.deepcopy(rates)}}
    return values


def located(name: str, folder: Path) -> str:
    """Return the whole path of a file that a recipe names: beside the recipe, or as given."""
    beside = folder / name
    return str(beside.resolve() if beside.exists() else Path(name).resolve())


def _located(data: MixtureConfig, folder: Path) -> MixtureConfig:
    def one(name: str) -> str:
        return located(name, folder)

    return data.model_copy(
        update={
            "train": [one(name) for name in data.train],
            "validation": [one(name) for name in data.validation],
            "templates": one(data.templates) if data.templates else None,
        }
    )
