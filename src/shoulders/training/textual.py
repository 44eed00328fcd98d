"""Training textual recursion: first pass, cross-fitted candidates, second pass, one skill.

Every stage leaves its result in the output folder, so that a stopped run goes on with the stage it
was in. The second pass is trained on candidates of first passes that have not seen the row: one
that has proposes unrealistically good answers.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file

from shoulders.data.mixture import Mixture, MixtureConfig
from shoulders.data.rows import Row, as_line
from shoulders.encoders.load import load_encoder
from shoulders.errors import RecipeError, ShouldersError, TrainingError
from shoulders.files import atomic_path, only_writer, remove_partial
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.recursion.candidates import Candidate, shown, stream_of
from shoulders.skills.artefact import FILE, TENSORS, read_artefact, save_skill, saved_in
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.configs import CrossFitConfig
from shoulders.training.gate import gate_of
from shoulders.training.processes import Processes
from shoulders.training.proposing import candidates_of, proposing_seconds
from shoulders.training.recipe import Recipe, read_recipe
from shoulders.training.run import data_hashes, load_data, run_recipe, unseen_rows
from shoulders.training.start import (
    MEMBERS,
    TEXTUAL,
    YAML,
    same_recipe,
    start_hashes,
    trained_parts,
)
from shoulders.training.validation import check_selectable, choose_rows

FIRST = "passes.0.prompt"
FOLDS, SECOND = "folds", "second"


def run_textual(
    recipe: Recipe,
    out: Path | str,
    *,
    resume: bool = False,
    console: Console | None = None,
    validation: Sequence[Row] | None = None,
) -> Skill:
    """Train what a recipe with `cross_fit` describes and save the skill in `out`.

    Args:
        recipe: what to train.
        out: the skill's folder.
        resume: go on with what a stopped run left there.
        console: for progress; None is silent.
        validation: rows to select on, in place of the recipe's.

    Raises:
        TrainingError: `out` holds a finished skill, an unfinished run without `resume`, or one of
            another recipe.
        RecipeError: the first pass is not what the recipe says.
        ShouldersError: another process writes there.
    """
    out = Path(out)
    with only_writer(out):
        return _run_textual(recipe, out, resume, console or Console(quiet=True), validation)


def _run_textual(
    recipe: Recipe,
    out: Path,
    resume: bool,
    console: Console,
    selecting: Sequence[Row] | None,
) -> Skill:
    assert recipe.cross_fit is not None
    assert recipe.data is not None  # the recipe's validator
    if saved_in(out).exists():
        raise TrainingError(f"{out}: already holds a finished skill; choose another --out")
    if (out / MEMBERS).exists():
        raise TrainingError(f"{out}: holds an ensemble that was begun; choose another --out")
    if out.exists() and any(out.iterdir()) and not resume:
        raise TrainingError(f"{out}: holds an unfinished run; add --resume or choose another --out")
    if Processes.started().count > 1:
        raise TrainingError("cross_fit trains several skills after one another: start one process")
    same_recipe(recipe, out / TEXTUAL, data_hashes(recipe) | start_hashes(recipe.start))
    _clean(out)

    def run(other: Recipe, folder: Path) -> Skill:
        return run_recipe(other, folder, resume=True, console=console)

    parts = trained_parts(recipe.start, out, run, console)
    first = parts.pop(FIRST)
    taught = _first_recipe(recipe, first)
    rows, validation, templates = load_data(recipe.data)
    mixture = Mixture(rows, templates, recipe.data, recipe.training.seed)
    drawn = [mixture.example(i) for i in range(recipe.cross_fit.rows)]
    unseen = choose_rows(
        unseen_rows(validation if selecting is None else selecting, rows),
        recipe.training.validation_rows,
    )
    check_selectable(recipe.training.select, unseen)
    checked = [(row, templates.render(row, 0)) for row in unseen]

    files = {"train": out / SECOND / "train.jsonl", "validation": out / SECOND / "validation.jsonl"}
    if not all(file.is_file() for file in files.values()):
        folders = [
            _fold(recipe.cross_fit, number, taught, rows, out, run)
            for number in range(recipe.cross_fit.folds)
        ]
        held: list[list[int]] = [[] for _ in folders]
        for i, (row, _) in enumerate(drawn):
            held[fold_of(row, recipe.cross_fit.folds)].append(i)
        found: list[list[Candidate]] = [[] for _ in drawn]
        for folder, own in zip(folders, held, strict=True):
            several = candidates_of(recipe, folder, [drawn[i][1] for i in own], console)
            for i, candidates in zip(own, several, strict=True):
                found[i] = candidates
        known = candidates_of(recipe, first, [text for _, text in checked], console, out)
        lm = load_lm(**recipe.lm.model_dump())
        second = Skill.create(lm, _second_config(recipe), functools.cache(load_encoder))
        _write(files["train"], recipe, second, drawn, found, shuffled=True)
        _write(files["validation"], recipe, second, checked, known, shuffled=False)
        del lm, second

    trained = Recipe(
        lm=recipe.lm,
        skill=_second_config(recipe),
        data=MixtureConfig(
            # What was drawn at the recipe's temperature, as often as it was drawn.
            train=[str(files["train"])],
            validation=[str(files["validation"])] if checked else [],
        ),
        start={_moved(k, -recipe.skill.stage[0]): str(v) for k, v in parts.items()},
        training=recipe.training,
    )
    if not (out / SECOND / FILE).is_file():
        run(trained, out / SECOND)
    lm = load_lm(**recipe.lm.model_dump())
    skill = Skill.create(lm, recipe.skill, functools.cache(load_encoder))
    _load(skill, first, out / SECOND)
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "recipe": recipe.model_dump(mode="json"),
        "first_pass": read_artefact(first).provenance,
        "second_pass": read_artefact(out / SECOND).provenance,
        "candidates_seconds": round(proposing_seconds((out, *(out / FOLDS).glob("*/"))), 3),
        "machine": machine(),
    }
    save_skill(skill, out, templates, provenance, gate_of(skill, checked))
    return skill


def fold_of(row: Row, folds: int) -> int:
    """Return the fold that a row is held out of: the same for rows of equal task and input."""
    content = hashlib.sha256(f"{row.task}\n{' '.join(row.input.casefold().split())}".encode())
    return int.from_bytes(content.digest()[:8]) % folds


def _fold(
    config: CrossFitConfig,
    number: int,
    taught: Recipe,
    rows: Sequence[Row],
    out: Path,
    run: Any,
) -> Path:
    """Train a first pass on all rows but a fold's; return its folder (trained before: that)."""
    folder = out / FOLDS / f"{number + 1}-of-{config.folds}"
    if (folder / FILE).is_file():
        return folder
    assert taught.data is not None  # see `_first_recipe`
    kept = [row for row in rows if fold_of(row, config.folds) != number]
    if not kept or len(kept) == len(rows):
        raise TrainingError(
            f"{len(rows)} rows cannot be split into {config.folds} folds: use fewer"
        )
    file = out / FOLDS / f"without-{number + 1}-of-{config.folds}.jsonl"
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for row in kept:
            stream.write(as_line(row))
    training = taught.training
    if config.steps is not None:
        training = training.model_copy(update={"steps": config.steps})
    data = taught.data.model_copy(update={"train": [str(file)]})
    run(taught.model_copy(update={"data": data, "training": training}), folder)
    return folder


def _write(
    file: Path,
    recipe: Recipe,
    second: Skill,
    examples: Sequence[tuple[Row, str]],
    candidates: Sequence[Sequence[Candidate]],
    *,
    shuffled: bool,
) -> None:
    """Write what the second pass reads of every example, as rows to train or select on."""
    before = recipe.skill.before_text()
    assert before is not None  # the recipe's validator
    room = second.input_room(before[1].max_new_tokens)
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for i, ((row, text), own) in enumerate(zip(examples, candidates, strict=True)):
            order = stream_of(text, recipe.training.seed, i) if shuffled else None
            read = shown(text, own, before[1], second.count_tokens, room, order)
            stream.write(as_line(replace(row, input=read.text)))


def _first_recipe(recipe: Recipe, first: Path) -> Recipe:
    """Return the recipe that the first pass was trained with; raises where it is another pass."""
    artefact = read_artefact(first)
    before = recipe.skill.before_text()
    assert before is not None  # the recipe's validator
    if artefact.skill.passes != before[0].passes or artefact.skill.format != recipe.skill.format:
        raise RecipeError(
            f"start.{FIRST}: {first} holds another first pass (or text format) than the recipe's "
            f"passes.0: {artefact.skill.passes[0].prompt} and {before[0].passes[0].prompt}"
        )
    try:
        taught = Recipe.model_validate(artefact.provenance["recipe"])
    except (KeyError, ValidationError):
        raise RecipeError(
            f"start.{FIRST}: {first} does not say with which recipe it was trained"
        ) from None
    if taught.data is None:
        raise RecipeError(f"start.{FIRST}: {first} was trained on running text, not on tasks")
    # A fold's first pass would begin at the same weights, which have seen the rows held out of it.
    for part, name in taught.start.items():
        if not _of_text(Path(name)):
            raise RecipeError(
                f"start.{FIRST}: {first} began at {name} (its start.{part}), which was not trained "
                "on running text alone: the folds' first passes could have seen what is held out"
            )
    return taught


def _of_text(source: Path) -> bool:
    """Tell whether a skill, or a recipe's, has learned from running text and nothing else."""
    try:
        if source.suffix in YAML:
            recipe = read_recipe(source)
        else:
            recipe = Recipe.model_validate(read_artefact(source).provenance["recipe"])
    except (KeyError, ValidationError, ShouldersError):
        return False
    return recipe.data is None and all(_of_text(Path(name)) for name in recipe.start.values())


def _second_config(recipe: Recipe) -> SkillConfig:
    """Return the passes after the text as a skill of their own."""
    passes = tuple(recipe.skill.passes[i] for i in recipe.skill.stage)
    return SkillConfig(passes=passes, format=recipe.skill.format)


def _load(skill: Skill, first: Path, second: Path) -> None:
    """Put both trained passes into the whole skill."""
    assert skill.proposals is not None  # it was made for such a skill
    before, after = skill.proposals.skill.trained, skill.trained
    own = load_file(second / TENSORS)
    if len(_passes(second)) == 1:
        only = skill.config.stage[0]
        own = {f"passes.{only}.prompt.{name}": value for name, value in own.items()}
    else:
        own = {_moved(name, skill.config.stage[0]): value for name, value in own.items()}
    with torch.no_grad():
        if before is not None:
            before.load_state_dict(load_file(first / TENSORS))
        if after is not None:
            after.load_state_dict(own)


def _passes(folder: Path) -> Sequence[object]:
    return read_artefact(folder).skill.passes


def _moved(name: str, by: int) -> str:
    """Return a tensor's or part's name with the number of its pass moved."""
    passes, number, rest = name.split(".", 2)
    return f"{passes}.{int(number) + by}.{rest}"


def _clean(out: Path) -> None:
    """Remove what a kill left half-written."""
    for folder in (out, out / SECOND, out / FOLDS):
        if folder.is_dir():
            remove_partial(folder)
