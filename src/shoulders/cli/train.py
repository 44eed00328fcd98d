"""`shoulders train RECIPE.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.common import quiet_libraries, stderr, stdout


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
    from shoulders.training.recipe import read_recipe

    parsed = read_recipe(recipe, overrides or ())
    if dry_run:
        prompt = parsed.skill.passes[0].prompt
        stdout().print(
            f"{recipe}: valid; LM {parsed.lm.name}, prompt {prompt['kind'] if prompt else 'none'}, "
            f"{parsed.training.steps} steps of {parsed.training.rows_per_step} rows"
        )
        return
    from shoulders.training.processes import Processes
    from shoulders.training.run import run_recipe

    quiet_libraries()
    folder = out or Path("runs") / recipe.stem
    skill = run_recipe(parsed, folder, resume=resume, console=stderr())
    if not Processes.started().leads:
        return
    stdout().print(
        f"saved [bold]{folder}[/]: {skill.trained_parameters:,} trained parameters around "
        f"{skill.lm.parameters:,} frozen ones, which are unchanged (checked by SHA-256)"
    )
