"""`shoulders train RECIPE.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from shoulders.cli.common import quiet_libraries, stderr, stdout

if TYPE_CHECKING:
    from shoulders.skills.ensemble import Ensemble
    from shoulders.skills.skill import Skill
    from shoulders.training.reader_recipe import ReaderRecipe
    from shoulders.training.recipe import Recipe


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, see the folder recipes/.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the skill. Default: runs/RECIPE-NAME.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override a key, such as training.steps=100. Repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check the recipe; loads and trains nothing.")
    ] = False,
) -> None:
    """Train a skill around the frozen LM. Ctrl-C saves a checkpoint; --resume goes on."""
    from shoulders.training.reader_recipe import is_reader
    from shoulders.training.recipe import read_recipe

    folder = out or Path("runs") / recipe.stem
    if is_reader(recipe):
        _train_reader(recipe, folder, overrides or [], resume=resume, dry_run=dry_run)
        return
    parsed = read_recipe(recipe, overrides or ())
    if dry_run:
        stdout().print(f"{recipe}: valid; {_facts(parsed)}", markup=False)
        return
    from shoulders.training import train as training
    from shoulders.training.processes import Processes

    quiet_libraries()
    skill = training.train(parsed, folder, resume=resume, console=stderr())
    if not Processes.started().leads:
        return
    stdout().print(_saved(folder, skill))


def _train_reader(
    recipe: Path, folder: Path, overrides: list[str], *, resume: bool, dry_run: bool
) -> None:
    from shoulders.training.reader_recipe import read_reader_recipe

    parsed = read_reader_recipe(recipe, overrides)
    if dry_run:
        valid = f"{recipe}: valid; a reader of {parsed.reader.collection}, {_facts(parsed)}"
        stdout().print(valid, markup=False)
        return
    from shoulders.cli.bars import Bars
    from shoulders.training.read import run_reader_recipe

    quiet_libraries()
    reader = run_reader_recipe(parsed, folder, Bars(stderr()), resume=resume, console=stderr())
    stdout().print(_saved(folder, reader.skill))


def _facts(recipe: Recipe | ReaderRecipe) -> str:
    members = getattr(recipe, "members", 1)
    passes = " -> ".join(
        (one.prompt["kind"] if one.prompt else "no prompt")
        + (", link" if one.link else ", proposing" if one.propose else "")
        for one in recipe.skill.passes
    )
    return (
        f"LM {recipe.lm.name}, {f'{members} members, ' if members > 1 else ''}"
        f"{'passes' if len(recipe.skill.passes) > 1 else 'prompt'} {passes}, "
        f"{recipe.training.steps} steps of {recipe.training.rows_per_step} rows"
    )


def _saved(folder: Path, skill: Skill | Ensemble) -> str:
    return (
        f"saved [bold]{escape(str(folder))}[/]: {skill.trained_parameters:,} trained parameters "
        f"around {skill.lm.parameters:,} frozen ones, which are unchanged (checked by SHA-256)"
    )
