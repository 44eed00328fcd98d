"""Training and asking the frozen methods of a comparison, all around one LM in memory."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.comparison.rows import Rows
from shoulders.data.mixture import Mixture
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.errors import TrainingError
from shoulders.files import atomic_directory, remove_partial
from shoulders.lm.frozen import FrozenLM
from shoulders.machine import machine
from shoulders.skills.artefact import (
    ENSEMBLE,
    FILE,
    TENSORS,
    frozen_parts,
    read_artefact,
    save_skill,
)
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import read_ensemble, save_ensemble
from shoulders.skills.load import load
from shoulders.skills.skill import Skill
from shoulders.training.ensemble import member_folder, member_seed
from shoulders.training.fit import fit
from shoulders.training.recipe import Recipe, make_recipe
from shoulders.training.start import begin_at
from shoulders.training.textual import run_textual

PROBE = 3  # steps: the fewest after which training checks that every tensor moves
WARMUP = 0.05  # of the steps


@dataclass(frozen=True, slots=True)
class Trained:
    """What training has come to: seconds, and the last loss on validation rows (nats).

    Of an ensemble: all members' seconds, their mean loss, and the first one's curve.
    """

    seconds: float
    loss: float
    curve: list[tuple[int, float]]


class Frozen:
    """The frozen methods around one LM.

    Args:
        lm: stays what it is.
        plan: what is compared.
        rows: on which rows.
        console: for progress.
    """

    def __init__(self, lm: FrozenLM, plan: Plan, rows: Rows, console: Console) -> None:
        self.lm, self.plan, self.rows, self._console = lm, plan, rows, console
        self._encoder: Callable[[str], FrozenEncoder] = functools.cache(load_encoder)
        self._forgetful: Callable[[str], FrozenEncoder] = functools.cache(
            functools.partial(load_encoder, on_disk=False)
        )

    def recipe(
        self,
        method: Method,
        steps: int,
        seed: int,
        factor: float,
        start: Mapping[str, Path] | None = None,
    ) -> Recipe:
        """Return what `shoulders train` would be told; `factor` multiplies all rates.

        Without the folders of `start`, its parts begin at the names of other methods.
        """
        rates = method.optimizer
        optimizer = {
            **rates,
            "lr": rates["lr"] * factor,
            "lr_for": {part: lr * factor for part, lr in rates.get("lr_for", {}).items()},
        }
        values: dict[str, Any] = {
            "lm": self.plan.lm.model_dump(),
            "skill": {"passes": list(method.passes), "format": method.format.model_dump()},
            "data": method.data(self.plan, steps).model_dump(),
            "training": {
                "steps": steps,
                "rows_per_step": self.plan.rows_per_step,
                "optimizer": optimizer,
                "warmup_steps": max(1, round(WARMUP * steps)),
                "validate_every": max(1, -(-steps // 4)),
                "validation_rows": self.plan.validation_rows,
                "select": "last",  # as of the rivals
                "save_every": max(1, -(-steps // 4)),
                "seed": seed,
            },
        }
        if method.proposes:
            folds = {"folds": 2, "steps": max(PROBE, steps // 3)}
            rows = min(steps * self.plan.rows_per_step, len(self.rows.train))
            values["cross_fit"] = {**folds, "rows": rows}
            values["start"] = {part: str(at) for part, at in (start or method.start).items()}
        return make_recipe(values, method.name)

    def train(
        self,
        method: Method,
        folder: Path,
        *,
        steps: int,
        seed: int,
        factor: float,
        start: dict[str, Path],
    ) -> Trained:
        """Train a method into `folder`, or go on with what a stopped run left there.

        An ensemble's members are trained one after the other, each into a folder inside.

        Args:
            method: which.
            folder: holds its skill at the end.
            steps: of the optimizer.
            seed: of values and order.
            factor: multiplies its rates.
            start: skills that its parts begin at.

        Raises:
            TrainingError: training diverged, or see `fit`.
        """
        if method.members > 1:
            return self._ensemble(method, folder, steps, seed, factor)
        recipe = self.recipe(method, steps, seed, factor, start)
        if method.proposes:
            if not (folder / FILE).is_file():
                chosen = self.rows.validation
                run_textual(recipe, folder, resume=True, console=self._console, validation=chosen)
            return _found(folder)
        skill = self._create(method, seed)
        begin_at(skill, start, self.lm)
        assert recipe.data is not None  # a comparison is on rows
        mixture = Mixture(self.rows.train, self.rows.templates, recipe.data, seed)
        progress = fit(
            skill, mixture, self.rows.validation, self.rows.templates, recipe, folder,
            bound=frozen_parts(skill), resume=True, console=self._console,
        )  # fmt: skip
        facts = {
            "steps": progress.step,
            "training_seconds": round(progress.seconds, 1),
            "validations": progress.validations,
            "recipe": recipe.model_dump(mode="json"),
            "machine": machine(),
        }
        if not (folder / FILE).is_file():
            save_skill(skill, folder, self.rows.templates, facts)
        return _found(folder)

    def _ensemble(
        self, method: Method, folder: Path, steps: int, seed: int, factor: float
    ) -> Trained:
        # Its members read the same examples, in other orders: those of the seed's other methods.
        alone, found = replace(method, members=1, drawn=seed), []
        names = [member_folder(number) for number in range(method.members)]
        for number, name in enumerate(names):
            own = member_seed(seed, method.members, number)
            if not (folder / name / FILE).is_file():
                self._console.print(f"  member {number + 1} of {method.members}")
                settings: dict[str, Any] = {"steps": steps, "seed": own, "factor": factor}
                self.train(alone, folder / name, start={}, **settings)
            found.append(_found(folder / name))
        if not (folder / ENSEMBLE).is_file():
            save_ensemble(folder, names, {"machine": machine()})
        seconds = sum(one.seconds for one in found)
        return Trained(seconds, fmean(one.loss for one in found), found[0].curve)

    def join(self, folder: Path, sources: Mapping[str, Path]) -> Trained:
        """Make the ensemble of finished skills, and of the members of ensembles, in `folder`.

        They are copied, so that the folder can be taken elsewhere.
        """
        remove_partial(folder)
        found: dict[str, Trained] = {}
        for name, source in sources.items():
            whole = (source / ENSEMBLE).is_file()
            inside = read_ensemble(source)[0].members if whole else [""]
            for one in (source / member for member in inside):
                own = f"{name}-{one.name}" if whole else name
                if own in found:
                    raise TrainingError(f"{folder}: two members are called {own}; rename a method")
                if not (folder / own).is_dir():
                    with atomic_directory(folder / own) as partial:
                        for file in (FILE, TENSORS, "README.md"):
                            shutil.copy2(one / file, partial / file)
                found[own] = _found(folder / own)
        if not (folder / ENSEMBLE).is_file():
            save_ensemble(folder, list(found), {"machine": machine()})
        seconds, losses = zip(*((one.seconds, one.loss) for one in found.values()), strict=True)
        return Trained(sum(seconds), fmean(losses), [])

    def skill(self, folder: Path, *, remembers: bool = True) -> Skill | Ensemble:
        """Return a trained skill, or the ensemble of several.

        Args:
            folder: where it was trained.
            remembers: whether its encoders look on disk for what they have read before.
        """
        return load(folder, self.lm, self._encoder if remembers else self._forgetful)[0]

    def step_seconds(self, method: Method) -> float:
        """Return what one step takes here, from a few that are thrown away."""
        recipe = self.recipe(method, PROBE, 0, 1.0)
        skill = self._create(method, 0)
        if skill.proposals is not None:  # its second pass reads longer inputs, its folds train too
            skill = skill.last
        assert recipe.data is not None
        mixture = Mixture(self.rows.train, self.rows.templates, recipe.data, 0)
        plain = recipe.model_copy(update={"cross_fit": None})
        with tempfile.TemporaryDirectory() as folder:
            quiet = Console(quiet=True)
            templates = self.rows.templates
            progress = fit(skill, mixture, [], templates, plain, Path(folder), console=quiet)
        return progress.seconds / PROBE

    def _create(self, method: Method, seed: int) -> Skill:
        random = torch.Generator().manual_seed(seed)
        config = self.recipe(method, 1, seed, 1.0).skill
        return Skill.create(self.lm, config, self._encoder, random)


def _found(folder: Path) -> Trained:
    """Return what training noted in a skill's folder, and in those of its parts inside it."""
    facts = read_artefact(folder).provenance
    inside = [read_artefact(f.parent).provenance for f in folder.glob(f"*/**/{FILE}")]
    seconds = sum(float(f.get("training_seconds", 0.0)) for f in (facts, *inside))
    seconds += float(facts.get("candidates_seconds", 0.0))
    validations = facts.get("second_pass", facts).get("validations", [])
    if not validations:
        raise TrainingError(f"{folder}: was never validated; give data.validation rows")
    curve = [(int(v["step"]), float(v["loss"])) for v in validations]
    return Trained(seconds, curve[-1][1], curve)
