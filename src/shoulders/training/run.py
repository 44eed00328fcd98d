"""From a recipe to a saved skill: load, train, save. What `shoulders train` does."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from shoulders.data.mixture import Mixture, MixtureConfig, select_rows
from shoulders.data.rows import Row, read_rows, task_of
from shoulders.data.templates import Templates
from shoulders.encoders.load import load_encoder
from shoulders.errors import DataError, TrainingError, require
from shoulders.files import only_writer, sha256_of_path
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.recursion.first_pass import FirstPass
from shoulders.skills.artefact import frozen_parts, save_skill, saved_in
from shoulders.skills.skill import Skill
from shoulders.training.checkpoint import FOLDER
from shoulders.training.fit import fit
from shoulders.training.gate import gate_of
from shoulders.training.processes import Processes
from shoulders.training.recipe import Recipe
from shoulders.training.running_text import RunningText
from shoulders.training.start import MEMBERS, begin_at, trained_parts
from shoulders.training.validation import check_selectable, choose_rows


def run_recipe(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    console: Console | None = None,
    parts: Mapping[str, Path] | None = None,
) -> Skill:
    """Train what a recipe describes and save the skill in `out`.

    Args:
        recipe: of one skill without passes that propose text; those with `cross_fit` are for
            `run_textual`, those with `members` for `run_ensemble`; `train` takes any.
        out: the skill's folder; checkpoints and `log.jsonl` lie in it while it is trained.
        resume: go on with what a stopped run left there.
        console: for progress; None is silent.
        parts: folders of what it starts from, where they are trained already.

    Returns:
        The trained skill, with the weights that `training.select` says.

    >>> recipe = read_recipe(Path("recipe.yaml"), ["training.steps=20"])  # doctest: +SKIP
    >>> skill = run_recipe(recipe, Path("runs/skill"))  # doctest: +SKIP

    Raises:
        TrainingError: `out` already holds a run and `resume` is not set, or see `fit`.
        DataError, LMError, RecipeError, ShouldersError: what cannot be read or written, or is
            written by another process.
    """
    out = Path(out)
    if recipe.training.tensorboard:
        require("train", "tensorboard")
    if recipe.cross_fit is not None:
        raise TrainingError("a recipe with cross_fit trains several skills: use train")
    if recipe.members > 1:
        raise TrainingError("a recipe with members trains several skills: use train")
    if saved_in(out).exists():
        raise TrainingError(f"{out}: already holds a finished skill; choose another --out")
    if (out / MEMBERS).exists():
        raise TrainingError(f"{out}: holds an ensemble that was begun; choose another --out")
    if (out / FOLDER).exists() and not resume:
        raise TrainingError(f"{out}: holds an unfinished run; add --resume or choose another --out")
    if not resume and out.exists() and (other := sorted(p.name for p in out.iterdir())):
        raise TrainingError(
            f"{out}: is not empty ({other[0]}); choose another --out, or --resume what was begun"
        )
    processes = Processes.started()
    processes.wait()  # before the first writes anything that the others would stumble over
    if not processes.leads:
        console = None
    train_part = functools.partial(_part, console=console)
    folders = parts or trained_parts(recipe.start, out, train_part, console)
    given = None if recipe.data is None else _task_data(recipe, recipe.data, console)
    processes.agree(
        "the recipe's skill or training",
        (recipe.skill.model_dump(mode="json"), recipe.training.model_dump(mode="json")),
    )
    lm = load_lm(**recipe.lm.model_dump(), shard=recipe.training.shard_lm)
    if console is not None and lm.shards is not None:
        console.print(
            f"each of {lm.shards.count} processes holds {lm.shards.held:,} of the "
            f"{lm.shards.parameters:,} parameters in the LM's layers"
        )
    random = torch.Generator().manual_seed(recipe.training.seed)
    skill = Skill.create(lm, recipe.skill, functools.cache(load_encoder), random)
    begin_at(skill, folders, lm)
    mixture, validation, templates = given or _text_data(recipe, lm)
    bound = {**frozen_parts(skill), "data": data_hashes(recipe)}
    processes.agree("LM or data files", bound)
    before = lm.digest()
    if recipe.training.remember_first_pass:
        taps = skill.parts.earlier[0].link.taps
        skill = skill.remembering(FirstPass(lm, taps))
    with only_writer(out) if processes.leads else contextlib.nullcontext():
        progress = fit(
            skill, mixture, validation, templates, recipe, out,
            bound=bound, resume=resume, console=console, processes=processes,
        )  # fmt: skip
        if lm.digest() != before:
            raise TrainingError("the frozen LM changed during training; nothing was saved")
        provenance: dict[str, Any] = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "steps": progress.step,
            "best_step": progress.best_step,
            "training_seconds": round(progress.seconds, 1),
            "validations": progress.validations,
            "lm_digest": before,
            "recipe": recipe.model_dump(mode="json"),
            "data_sha256": bound["data"],
            "machine": machine(),
        }
        if processes.leads:
            tasks = [] if isinstance(validation, RunningText) else validation
            checked = [(row, templates.render(row, 0)) for row in tasks]
            save_skill(skill, out, templates, provenance, gate_of(skill, checked))
    processes.wait()
    return skill


def _part(recipe: Recipe, folder: Path, *, console: Console | None) -> None:
    """Train what another recipe's part starts from, or go on with it."""
    run_recipe(recipe, folder, resume=True, console=console)


def _task_data(
    recipe: Recipe, data: MixtureConfig, console: Console | None
) -> tuple[Mixture, list[Row], Templates]:
    """Return what tasks a recipe trains and selects on, and says how many rows it may not."""
    rows, validation, templates = load_data(data)
    mixture = Mixture(rows, templates, data, recipe.training.seed)
    unseen = unseen_rows(validation, rows)
    if console is not None and len(unseen) < len(validation):
        console.print(
            f"{len(validation) - len(unseen)} validation rows also stand in the training "
            "files; they are not used to select"
        )
    check_selectable(recipe.training.select, unseen)
    chosen = choose_rows(unseen, recipe.training.validation_rows)
    if len(chosen) < len(unseen) and console is not None:
        console.print(
            f"selecting on {len(chosen)} of {len(unseen)} validation rows "
            "(training.validation_rows counts those of each task)"
        )
    return mixture, chosen, templates


def _text_data(
    recipe: Recipe, lm: FrozenLM
) -> tuple[RunningText, RunningText | list[Row], Templates]:
    """Return what running text a recipe trains and selects on."""
    text = recipe.text
    assert text is not None  # a recipe has tasks or text
    trained = RunningText(lm, text.train, text.chunk, recipe.training.seed)
    if not text.validation:
        return trained, [], Templates()
    return trained, RunningText(lm, text.validation, text.chunk), Templates()


def load_data(config: MixtureConfig) -> tuple[list[Row], list[Row], Templates]:
    """Return training rows, validation rows and templates of a recipe's `data`.

    Raises `DataError` for what cannot be read, or where no validation row is of the tasks chosen.
    """
    rows = read_all(config.train)
    # Rows that name no task belong to the one that they are named after, in both files.
    task = task_of(config.train[0]) if len(config.train) == 1 else None
    validation = select_rows(read_all(config.validation, task), config, missing_ok=True)
    if config.validation and not validation:
        select_rows(rows, config)  # a task that is in no file is told as such
        raise DataError(
            f"{config.validation[0]}: no row of the tasks that data.tasks and data.exclude leave; "
            "give others, or no data.validation"
        )
    if config.templates is None:
        return rows, validation, Templates()
    return rows, validation, Templates.read(Path(config.templates))


def unseen_rows(rows: Sequence[Row], training: Sequence[Row]) -> list[Row]:
    """Return the rows that do not occur in `training` (promise 2): their task and input.

    Of a task that nothing is trained on, their input: rows without a task are named after files.
    """
    seen, inputs = {(row.task, row.input) for row in training}, {row.input for row in training}
    tasks = {task for task, _ in seen}
    return [
        row
        for row in rows
        if ((row.task, row.input) not in seen if row.task in tasks else row.input not in inputs)
    ]


def read_all(paths: Sequence[str], task: str | None = None) -> list[Row]:
    """Return the rows of several files, in order; see `read_rows`."""
    return [row for path in paths for row in read_rows(Path(path), task=task)]


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of each data file (folders: of their files' hashes)."""
    given = recipe.data or recipe.text
    assert given is not None  # a recipe has tasks or text
    templates = recipe.data.templates if recipe.data else None
    return hashes_of((*given.train, *given.validation, *filter(None, [templates])))


def hashes_of(names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of files or folders by their names; of equal ones, `name#2` and so on."""
    hashes: dict[str, str] = {}
    seen = Counter[str]()
    for name in dict.fromkeys(names):
        short = Path(name).name
        seen[short] += 1
        key = short if seen[short] == 1 else f"{short}#{seen[short]}"
        hashes[key] = sha256_of_path(Path(name))
    return hashes
