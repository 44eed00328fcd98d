"""Training what a recipe describes, whichever it is: a skill, one of two passes, an ensemble."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from shoulders.skills.ensemble import Ensemble
from shoulders.skills.skill import Skill
from shoulders.training.ensemble import run_ensemble
from shoulders.training.recipe import Recipe
from shoulders.training.run import run_recipe
from shoulders.training.textual import run_textual


def train(
    recipe: Recipe, out: Path | str, *, resume: bool = False, console: Console | None = None
) -> Skill | Ensemble:
    """Train what a recipe describes and save it in `out`.

    Args:
        recipe: with `members` several skills are trained, that answer together; with `cross_fit`
            those that a skill needs whose passes propose text.
        out: its folder; what a stopped run has left lies in it too.
        resume: go on with that.
        console: for progress; None is silent.

    Raises:
        TrainingError, DataError, LMError, RecipeError, ShouldersError: see `run_recipe`.

    >>> recipe = read_recipe("recipe.yaml", ["training.steps=20"])  # doctest: +SKIP
    >>> skill = train(recipe, "runs/skill")  # doctest: +SKIP
    """
    if recipe.members > 1:
        return run_ensemble(recipe, out, resume=resume, console=console)
    if recipe.cross_fit is not None:
        return run_textual(recipe, out, resume=resume, console=console)
    return run_recipe(recipe, out, resume=resume, console=console)
