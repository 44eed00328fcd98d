"""Training an ensemble: its members one after the other, from other seeds, and then their bond."""

from __future__ import annotations

import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.encoders.load import load_encoder
from shoulders.errors import TrainingError
from shoulders.files import only_writer, remove_partial
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.skills.artefact import FILE, read_artefact, saved_in
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import load_ensemble, save_ensemble
from shoulders.skills.skill import Skill
from shoulders.training.checkpoint import FOLDER, difference
from shoulders.training.processes import Processes
from shoulders.training.recipe import Recipe, as_now, by_name
from shoulders.training.run import data_hashes, run_recipe
from shoulders.training.start import FOLDER as PARTS
from shoulders.training.start import MEMBERS, TEXTUAL, same_recipe, start_hashes, trained_parts


def member_folder(number: int) -> str:
    """Return the name of a member's folder inside its ensemble's; they are counted from 0."""
    return f"member-{number}"


def member_seed(seed: int, members: int, number: int) -> int:
    """Return a member's seed: those of ensembles with different seeds have none in common."""
    return seed * members + number


def member_recipe(recipe: Recipe, number: int) -> Recipe:
    """Return what a member is trained by; of `data.examples`, all members read the same ones."""
    seed = member_seed(recipe.training.seed, recipe.members, number)
    updates: dict[str, Any] = {
        "members": 1,
        "training": recipe.training.model_copy(update={"seed": seed}),
    }
    if recipe.data is not None and recipe.data.examples is not None:
        drawn = recipe.training.seed if recipe.data.seed is None else recipe.data.seed
        updates["data"] = recipe.data.model_copy(update={"seed": drawn})
    return recipe.model_copy(update=updates)


def run_ensemble(
    recipe: Recipe, out: Path | str, *, resume: bool = False, console: Console | None = None
) -> Ensemble:
    """Train every member that a recipe with `members` describes and save their ensemble in `out`.

    Raises:
        TrainingError: `out` holds a finished ensemble, an unfinished one without `resume`, or
            another recipe's; or see `run_recipe`.
        ShouldersError: another process writes there.
    """
    out = Path(out)
    if Processes.started().count > 1:
        raise TrainingError("members are trained after one another: start one process")
    with only_writer(out):
        return _run(recipe, out, resume=resume, console=console or Console(quiet=True))


def _run(recipe: Recipe, out: Path, *, resume: bool, console: Console) -> Ensemble:
    if saved_in(out).exists():
        raise TrainingError(f"{out}: already holds a finished skill; choose another --out")
    if out.exists() and any(out.iterdir()) and not resume:
        raise TrainingError(f"{out}: holds an unfinished run; add --resume or choose another --out")
    if (out / FOLDER).exists() or (out / TEXTUAL).exists():
        raise TrainingError(f"{out}: holds a single skill's unfinished run; choose another --out")
    if not any((out / part).exists() for part in (member_folder(0), PARTS)):
        (out / MEMBERS).unlink(missing_ok=True)  # nothing was trained: it can still be put right
    same_recipe(recipe, out / MEMBERS, data_hashes(recipe) | start_hashes(recipe.start))
    remove_partial(out)

    def run(other: Recipe, folder: Path) -> Skill:
        return run_recipe(other, folder, resume=True, console=console)

    parts = trained_parts(recipe.start, out, run, console)  # once, for all members
    names = [member_folder(number) for number in range(recipe.members)]
    for number, name in enumerate(names):
        own = member_recipe(recipe, number)
        if (out / name / FILE).is_file():
            _check_finished(out / name, own)
            continue
        console.print(f"member {number + 1} of {recipe.members}")
        run_recipe(own, out / name, resume=True, console=console, parts=parts)
    members = [read_artefact(out / name).provenance for name in names]
    provenance = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "training_seconds": sum(float(own["training_seconds"]) for own in members),
        "recipe": recipe.model_dump(mode="json"),
        "machine": machine(),
    }
    save_ensemble(out, names, provenance)
    lm = load_lm(**recipe.lm.model_dump())
    return load_ensemble(out, lm, functools.cache(load_encoder))[0]


def _check_finished(folder: Path, recipe: Recipe) -> None:
    """Raise `TrainingError` where a finished member was trained by another recipe or data."""
    noted = read_artefact(folder).provenance
    begun = by_name(as_now(noted.get("recipe") or {}, Recipe))
    found = difference(begun, by_name(recipe.model_dump(mode="json")))
    if not found and noted.get("data_sha256") != data_hashes(recipe):
        found = "other data"
    if found:
        raise TrainingError(
            f"{folder}: is no member of this ensemble ({found}); move it away, or choose another "
            "--out"
        )
