"""Checkpoints: everything a run needs to go on bit for bit; safetensors and JSON only."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shoulders.errors import ArtefactError, ShouldersError, TrainingError
from shoulders.files import atomic_directory, sha256_of_file
from shoulders.training.recipe import Recipe, as_now, by_name

FOLDER = "checkpoints"


@dataclass(slots=True)
class Progress:
    """Where a run stands: all of its state that is not a tensor.

    Attributes:
        step: optimizer steps done.
        best_step: step of the best validation so far; 0 before the first.
        best: its value (lower is better).
        validations: one entry per validation, in order.
        seconds: time of training steps so far, over all resumed parts; validations and checkpoints
            are not counted.
    """

    step: int = 0
    best_step: int = 0
    best: float = float("inf")
    validations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


Tensors = dict[str, torch.Tensor]
LATER = ("encoders", "chat_template")  # not noted before 2026-12


def save_checkpoint(
    out: Path,
    progress: Progress,
    weights: Tensors,
    best: Tensors,
    optimizer: torch.optim.Optimizer,
    recipe: dict[str, Any],
) -> None:
    """Write `out/checkpoints/step-N` and then remove older ones; atomic."""
    folder = out / FOLDER / f"step-{progress.step:07d}"
    if folder.exists():
        return
    tensors = {f"model.{name}": value for name, value in weights.items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    state = {"progress": _finite(asdict(progress)), "recipe": recipe}
    with atomic_directory(folder) as temporary:
        file = temporary / "state.safetensors"
        try:
            save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, file)
        except SafetensorError as error:  # what it makes of a full disk
            raise ShouldersError(f"{folder}: cannot write: {error}") from error
        state["sha256"] = sha256_of_file(file)
        (temporary / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for old in sorted((out / FOLDER).glob("step-*")):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint as it lies on disk.

    Attributes:
        folder: where it lies.
        progress: where the run stood.
        recipe: what was trained, as it was noted then.
        tensors: weights, the best ones, and the optimizer's state.
    """

    folder: Path
    progress: Progress
    recipe: dict[str, Any]
    tensors: Tensors

    @property
    def weights(self) -> Tensors:
        """What was trained, as it stood."""
        return _part(self.tensors, "model.")

    @property
    def best(self) -> Tensors:
        """The same of the best validation."""
        return _part(self.tensors, "best.")

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's state back."""
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _part(self.tensors, "optimizer.").items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def read_checkpoint(out: Path) -> Stored | None:
    """Read the newest checkpoint below `out`; None where there is none.

    Raises `ArtefactError` for a damaged one.
    """
    folders = sorted((out / FOLDER).glob("step-*"))
    if not folders:
        return None
    folder = folders[-1]
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if sha256_of_file(folder / "state.safetensors") != state["sha256"]:
            raise ArtefactError(f"{folder}: state.safetensors is damaged (its hash differs)")
        values = state["progress"]
        values["best"] = float("inf") if values["best"] is None else values["best"]
        tensors = load_file(folder / "state.safetensors")
        return Stored(folder, Progress(**values), {**state["recipe"]}, tensors)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtefactError(f"{folder}: cannot be read: {error!r}") from error


def load_checkpoint(
    out: Path, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> tuple[Progress, Tensors, Tensors] | None:
    """Read the newest checkpoint below `out` into `optimizer`; None where there is none.

    Data files may have moved since it was written: what is in them is for the caller to note.

    Returns:
        Progress, current weights, weights of the best validation.

    Raises:
        TrainingError: the run was started with another recipe (names the key).
        ArtefactError: the checkpoint is damaged.
    """
    stored = read_checkpoint(out)
    if stored is None:
        return None
    try:
        started = {**stored.recipe, "recipe": by_name(as_now(stored.recipe["recipe"], Recipe))}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{stored.folder}: cannot be read: {error!r}") from error
    wanted = {**recipe, "recipe": by_name(recipe["recipe"])}
    wanted = {key: value for key, value in wanted.items() if key in started or key not in LATER}
    if found := difference(started, wanted):
        raise TrainingError(
            f"{out}: was started with another recipe ({found}); resume with the same "
            "one, or train into a new folder"
        )
    stored.restore(optimizer)
    return stored.progress, stored.weights, stored.best


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an absent best value is null."""
    return values | {"best": values["best"] if values["best_step"] else None}


def difference(old: Any, new: Any, key: str = "") -> str:
    """Return the first key whose values differ, with both values, or an empty string."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in dict.fromkeys([*old, *new]):
            inner = f"{key}.{name}" if key else name
            if found := difference(old.get(name), new.get(name), inner):
                return found
        return ""
    return "" if old == new else f"{key} was {old!r}, is {new!r}"
