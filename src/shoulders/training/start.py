"""Where trained parts begin: at those of other skills, trained before or by the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from shoulders.errors import RecipeError, TrainingError
from shoulders.files import read_noted, write_json
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.artefact import FILE, TENSORS, read_artefact
from shoulders.skills.skill import Skill
from shoulders.training.checkpoint import difference
from shoulders.training.recipe import Recipe, as_now, by_name, read_recipe

FOLDER = "parts"  # of an output folder: what its own recipes train
# There: the recipe of an ensemble, or of textual recursion, that was begun.
MEMBERS, TEXTUAL = "members.json", "textual.json"
YAML = (".yaml", ".yml")
Run = Callable[[Recipe, Path], object]


def trained_parts(
    start: Mapping[str, str], out: Path, run: Run, console: Console | None
) -> dict[str, Path]:
    """Return the skill folder of every part that starts elsewhere, after training what is a recipe.

    A recipe is trained into `out/parts/NAME`; several parts may come from the same one.

    Args:
        start: part (`passes.0.link`) to skill folder or recipe.
        out: the run's folder.
        run: trains a recipe into a folder, or goes on with it.
        console: says what is trained.

    Raises:
        RecipeError: one of the recipes is of an ensemble, or see `read_recipe`.
    """
    named = {part: Path(name) for part, name in start.items()}
    folders = {
        part: out / FOLDER / source.stem if source.suffix in YAML else source
        for part, source in named.items()
    }
    for part, source in named.items():
        for other, another in named.items():
            if folders[part] == folders[other] and source != another:
                raise RecipeError(
                    f"start.{part} and start.{other}: {source} and {another} are trained into one "
                    "folder; give the recipes other names"
                )
    for part, source in named.items():
        if source.suffix in YAML and (folders[part] / FILE).is_file():
            _check_trained(part, folders[part], read_recipe(source))
    missing = {
        part: read_recipe(source)
        for part, source in named.items()
        if source.suffix in YAML and not (folders[part] / FILE).is_file()
    }
    for part, recipe in missing.items():
        if recipe.members > 1:
            raise RecipeError(
                f"start.{part}: {named[part]} trains an ensemble; a part is of one skill"
            )
    for part, recipe in missing.items():
        if (folders[part] / FILE).is_file():
            continue  # another part comes from the same recipe
        if console is not None:
            console.print(f"{part} starts from {named[part].name}: training it first")
        run(recipe, folders[part])
    return folders


def _check_trained(part: str, folder: Path, recipe: Recipe) -> None:
    """Raise `TrainingError` where a finished part was trained by what is not its recipe now."""
    noted = read_artefact(folder).provenance.get("recipe") or {}
    begun = by_name(as_now(noted, Recipe))
    if found := difference(begun, by_name(recipe.model_dump(mode="json"))):
        raise TrainingError(
            f"start.{part}: {folder} was trained by another recipe ({found}); move it away, or "
            "choose another --out"
        )


def same_recipe(recipe: BaseModel, file: Path, data: Mapping[str, str]) -> None:
    """Note a run's recipe, and the hashes of its data, in `file`.

    Raises `TrainingError` where another recipe, or other data, has begun there.
    """
    values = {**recipe.model_dump(mode="json"), "data_sha256": dict(data)}
    if not file.is_file():
        write_json(file, values)
        return
    begun = as_now(read_noted(file), type(recipe))
    hashes = begun.setdefault("data_sha256", values["data_sha256"])  # not noted before 2026-11-29
    changed = [name for name, value in data.items() if hashes.get(name, value) != value]
    if changed or difference(by_name(begun), by_name(values)):
        what = f"{changed[0]} as it was before" if changed else "another recipe"
        raise TrainingError(f"{file.parent}: was begun with {what}; choose another --out")


def start_hashes(start: Mapping[str, str]) -> dict[str, str]:
    """Return the SHA-256 of the tensors of every skill's folder that a recipe's parts begin at."""
    folders = {part: Path(name) for part, name in start.items() if Path(name).suffix not in YAML}
    return {f"start.{part}": read_artefact(one).tensors_sha256 for part, one in folders.items()}


def begin_at(skill: Skill, parts: Mapping[str, Path], lm: FrozenLM) -> None:
    """Load trained parts of other skills into those of a new one.

    Raises:
        RecipeError: no such part, another skill of it, another shape.
        ArtefactError: the folder is damaged.
    """
    for part, folder in parts.items():
        artefact = read_artefact(folder)
        if artefact.lm.fingerprint != lm.fingerprint:
            raise RecipeError(
                f"start.{part}: {folder} was trained on '{artefact.lm.name}' "
                f"({artefact.lm.fingerprint}), not on '{lm.name}' ({lm.fingerprint})"
            )
        if missing := _encoders(skill, part) - {e.fingerprint for e in artefact.encoders}:
            raise RecipeError(
                f"start.{part}: {folder} was trained on other encoders, not on {missing.pop()}"
            )
        found = part_of(folder, part.rpartition(".")[2])
        own: dict[str, Tensor] = {}
        for network in skill.networks():
            state = network.state_dict()
            own |= {n: v for n, v in state.items() if n.startswith(f"{part}.")}
            if len(skill.config.passes) == 1 and part == "passes.0.prompt":
                own = {f"{part}.{n}": v for n, v in state.items()}
        if not own:
            raise RecipeError(f"start.{part}: the skill has no such part")
        wanted = {n.removeprefix(f"{part}."): v for n, v in own.items()}
        shapes = {n: tuple(v.shape) for n, v in wanted.items()}
        theirs = {n: tuple(v.shape) for n, v in found.items()}
        if shapes != theirs:
            name = next(n for n in {**shapes, **theirs} if shapes.get(n) != theirs.get(n))
            raise RecipeError(
                f"start.{part}: {folder} holds another kind of part: its '{name}' is "
                f"{theirs.get(name, 'missing')}, here it is {shapes.get(name, 'missing')}"
            )
        with torch.no_grad():
            for name, value in wanted.items():  # views of the networks' own tensors
                value.copy_(found[name])


def _encoders(skill: Skill, part: str) -> set[str]:
    """Return the fingerprints of the encoders that a part of a skill reads with."""
    producers = [*(earlier.producer for earlier in skill.parts.earlier), skill.parts.producer]
    names = [f"passes.{number}.prompt" for number in skill.config.stage]
    found = dict(zip(names, producers, strict=True)).get(part)
    return set() if found is None else {encoder.fingerprint for encoder in found.encoders()}


def part_of(folder: Path, kind: str) -> dict[str, Tensor]:
    """Return the tensors of a saved skill's only `prompt` or `link`, without its name.

    Raises `RecipeError` where there is none, or more than one.
    """
    tensors = load_file(folder / TENSORS)
    passes = read_artefact(folder).skill.passes
    if kind == "prompt" and len(passes) == 1:
        return tensors
    having = {n.split(".")[1] for n in tensors if n.startswith("passes.") and f".{kind}." in n}
    if len(having) != 1:
        raise RecipeError(f"{folder}: has {len(having)} parts of the kind '{kind}', not one")
    prefix = f"passes.{having.pop()}.{kind}."
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
