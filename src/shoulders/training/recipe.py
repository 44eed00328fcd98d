"""Recipes: one YAML file that says which LM, which skill, which data and how to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoulders.data.mixture import MixtureConfig
from shoulders.errors import RecipeError, nearest
from shoulders.lm.load import Precision
from shoulders.lm.quantized import DeviceMap, Quantization
from shoulders.prompts.build import config_of
from shoulders.skills.config import SkillConfig


class LMConfig(BaseModel):
    """The frozen LM: `embedded`, a Hub id, a folder or a .gguf file; see `load_lm`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "embedded"
    dtype: Precision = "auto"
    revision: str | None = None
    quantize: Quantization | None = None
    device_map: DeviceMap | None = None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None


class OptimizerConfig(BaseModel):
    """AdamW or Adafactor, with learning rates by part.

    `lr_for` gives parts their own rate: the longest key that a parameter's name starts with
    (`base`, `generator`, `project`, ...) wins over `lr`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["adamw", "adafactor"] = "adamw"
    lr: float = Field(gt=0, allow_inf_nan=False)
    lr_for: dict[str, float] = {}
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.98)


class TrainingConfig(BaseModel):
    """How to train.

    Attributes:
        steps: optimizer steps.
        rows_per_step: examples per step; their loss is the mean over their answer tokens.
        micro_tokens: most positions in one forward pass; a step is split into such passes, and
            their gradients add up.
        streams: passes computed side by side, each on its share of the processor's threads;
            by default as many as threads, four at most, where the LM's layers are fused.
        shard_lm: started in several processes, each holds only its share of the LM's layers and
            gathers them one at a time (FSDP2); for LMs that do not fit beside their activations.
        recompute: keep only each layer's input of a pass and compute the rest again backwards:
            a third more work, a fraction of the memory. Needs fused layers.
        warmup_steps: linear from 0 to the full rate.
        decay: from there to 0 at the last step (`linear`, `cosine`) or not (`constant`).
        clip: largest norm of the gradient.
        seed: of initial values and of the order of examples.
        validate_every: steps between validations; the last step always validates.
        validation_rows: rows per task that select the best checkpoint.
        select: what the best checkpoint is best at, averaged over tasks.
        save_every: steps between checkpoints.
        tensorboard: also write TensorBoard event files.
        remember_first_pass: keep the states of a first pass without prompt on disk, so that later
            epochs read them: 4 bytes for every token and unit of width.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    rows_per_step: int = Field(default=16, ge=1)
    micro_tokens: int = Field(default=1024, ge=1)
    streams: int | None = Field(default=None, ge=1)
    shard_lm: bool = False
    recompute: bool = False
    optimizer: OptimizerConfig
    warmup_steps: int = Field(default=20, ge=0)
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = Field(default=1.0, gt=0)
    seed: int = Field(default=0, ge=0)
    validate_every: int = Field(default=200, ge=1)
    validation_rows: int = Field(default=8, ge=1)
    select: Literal["loss", "exact_match"] = "loss"
    save_every: int = Field(default=50, ge=1)
    tensorboard: bool = False
    remember_first_pass: bool = False


class RunningTextConfig(BaseModel):
    """Text files to learn the language-modelling task on.

    Attributes:
        train: UTF-8 files.
        validation: files to select on.
        chunk: tokens that are read at once; the first one is only read, the others predicted too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: list[str] = Field(min_length=1)
    validation: list[str] = []
    chunk: int = Field(default=128, ge=2)

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if both := sorted(set(self.train) & set(self.validation)):
            raise ValueError(f"'{both[0]}' is in both train and validation; remove it from one")
        return self


class CrossFitConfig(BaseModel):
    """How textual recursion gets the candidates that its second pass is trained on.

    A first pass that has seen a question proposes unrealistically good answers to it. So the
    training rows are split, and every fold's candidates come from a first pass that was trained
    on the other folds.

    Attributes:
        folds: how many such first passes are trained.
        steps: of each; None is as many as the first pass itself was trained for.
        rows: examples that the second pass is trained on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folds: int = Field(default=2, ge=2)
    steps: int | None = Field(default=None, ge=1)
    rows: int = Field(default=4096, ge=1)


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
        training: how.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lm: LMConfig = LMConfig()
    skill: SkillConfig
    data: MixtureConfig | None = None
    text: RunningTextConfig | None = None
    start: dict[str, str] = {}
    cross_fit: CrossFitConfig | None = None
    training: TrainingConfig

    @model_validator(mode="after")
    def _one_kind_of_data(self) -> Self:
        if (self.data is None) == (self.text is None):
            raise ValueError("give either data (tasks) or text (running text) to train on")
        if self.text is not None and self.training.select != "loss":
            raise ValueError("training.select: running text has no answers; use loss")
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
        return self


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (dotted keys, YAML values).

    Paths in `data` are looked up beside the recipe first, then in the working folder.

    Raises:
        RecipeError: names the file, the key and, for an unknown key, the nearest valid one.
    """
    recipe = make_recipe(read_values(path, overrides), str(path))
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
    return recipe.model_copy(update=updates)


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a recipe file says, overridden, and not yet validated; raises `RecipeError`."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with lm, skill, data and training")
    for one in overrides:
        override(values, one)
    return values


def make_recipe(values: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a recipe given as nested mappings; raises `RecipeError` naming `where`."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error, Recipe, values)}") from error
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error


def explain(error: ValidationError, model: type[BaseModel], values: Any) -> str:
    """Return the first problem of validating `values` as one line with its dotted key."""
    # A misspelt key may leave a required one missing: say what was misspelt.
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1], values)
        return f"unknown key '{key}'{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"key '{key}' is missing"
    said = str(first["msg"]).removeprefix("Value error, ")
    return f"key '{key}': {said}" if key else said


def override(values: dict[str, Any], given: str) -> None:
    """Set a dotted key of nested mappings, `key=value` with YAML's values, in place.

    Raises `RecipeError` for what is no such key or value.
    """
    key, equals, text = given.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {given}: expected key=value, such as training.steps=100")
    at: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(at, list):
            at = at[int(part)] if part.isdigit() and int(part) < len(at) else None
        elif isinstance(at, dict):
            at = at.setdefault(part, {})
        if not isinstance(at, dict | list):
            raise RecipeError(f"--set {given}: '{part}' holds no further keys")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {given}: '{text}' is not a YAML value") from error
    if isinstance(value, str):
        value = _number(value)
    if isinstance(at, list):
        if not last.isdigit() or int(last) >= len(at):
            raise RecipeError(f"--set {given}: '{last}' is not a place in that list")
        at[int(last)] = value
    else:
        at[last] = value


def _number(text: str) -> float | str:
    """Read `3e-2`, which YAML 1.1 takes for text, as the number everyone means."""
    try:
        return float(text)
    except ValueError:
        return text


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


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...], values: Any) -> list[str]:
    """Return the valid keys of the part of a recipe's `values` at `place`."""
    at: Any = model
    for part in place:
        values = values[part]
        if isinstance(part, int):
            continue
        field = at.model_fields.get(part) if hasattr(at, "model_fields") else None
        if field is None:
            return []
        at = field.annotation
        for inner in getattr(at, "__args__", ()):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                at = inner
        if part == "prompt":  # its fields are those of its kind of producer
            at = config_of(values.get("kind"))
    return list(getattr(at, "model_fields", {}))
