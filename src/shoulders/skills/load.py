"""Opening a folder, whichever it holds: a skill or an ensemble of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoulders.data.templates import Templates
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.artefact import ENSEMBLE, Artefact, load_skill, read_artefact
from shoulders.skills.ensemble import Ensemble
from shoulders.skills.ensemble_artefact import load_ensemble, read_ensemble
from shoulders.skills.hub import local_folder
from shoulders.skills.skill import Skill


def load(
    folder: Path | str, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder] | None = None
) -> tuple[Skill | Ensemble, Templates]:
    """Load what a folder holds around an LM, with the templates that it was trained with.

    Of a reader's folder that is the skill which reads its contexts; what finds them opens beside an
    index (`shoulders.skills.reader_artefact`).

    Args:
        folder: of a skill or an ensemble; or `hf://USER/SKILL`, see `shoulders.skills.hub`.
        lm: the frozen LM that it was trained on.
        encoder: returns an encoder by name, where several skills share them; None loads each once.

    Raises:
        ArtefactError: there is neither, it is damaged, or bound to another LM or encoder.

    >>> lm = load_lm("embedded", dtype="int8")  # doctest: +SKIP
    >>> skill, templates = load("runs/skill", lm)  # doctest: +SKIP
    """
    folder, encoder = local_folder(folder), encoder or functools.cache(load_encoder)
    if (folder / ENSEMBLE).is_file():
        return load_ensemble(folder, lm, encoder)
    return load_skill(folder, lm, encoder)


def provenance_of(folder: Path) -> dict[str, Any]:
    """Return how a skill or an ensemble came to be."""
    if (folder / ENSEMBLE).is_file():
        return read_ensemble(folder)[0].provenance
    return read_artefact(folder).provenance


def read_first(folder: Path) -> Artefact:
    """Return what a folder's skill, or its ensemble's first member, says of the LM it runs on."""
    if (folder / ENSEMBLE).is_file():
        return next(iter(read_ensemble(folder)[1].values()))
    return read_artefact(folder)
