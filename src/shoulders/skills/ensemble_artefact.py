"""Ensembles on disk: `ensemble.json` beside the folders of its members, each a skill of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict, Field

from shoulders import __version__
from shoulders.data.templates import Templates
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.errors import ArtefactError
from shoulders.files import write_json, write_text
from shoulders.lm.frozen import FrozenLM
from shoulders.manifest import read_versioned
from shoulders.skills.artefact import ENSEMBLE, Artefact, load_skill, read_artefact, saved_in
from shoulders.skills.ensemble import Ensemble

FORMAT_VERSION = 1

_CARD = """\
---
library_name: shoulders
base_model: {{ first.lm.name }}
tags: [soft-prompt, frozen-lm, ensemble]
---
# {{ name }}

{{ members | length }} skills that answer together around one frozen `{{ first.lm.name }}`, whose
weights are unchanged: {{ "{:,}".format(parameters) }} trained parameters in
{{ members | join(", ") }}, each of which is a skill of its own.

```bash
shoulders generate --skill PATH/TO/THIS/FOLDER --text "..."
shoulders info PATH/TO/THIS/FOLDER
```
"""


class EnsembleArtefact(BaseModel):
    """What `ensemble.json` holds; `members` are folders beside it, with their tensors' hashes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    shoulders_version: str
    members: dict[str, str] = Field(min_length=2)
    provenance: dict[str, Any]


def save_ensemble(
    folder: Path | str, members: Sequence[str], provenance: dict[str, Any]
) -> EnsembleArtefact:
    """Join skills that lie in `folder` to an ensemble; `members` are the names of their folders.

    Raises:
        ArtefactError: the folder already holds a skill or an ensemble, a member is damaged, or
            they do not go together.
        ShouldersError: it cannot be written.
    """
    folder = Path(folder)
    if saved_in(folder).exists():
        raise ArtefactError(f"{folder}: already holds a skill or an ensemble")
    for name in members:
        _check_name(folder, name)
    if len(set(members)) < max(2, len(members)):
        raise ArtefactError(f"{folder}: an ensemble has two different members or more")
    found = {name: read_artefact(folder / name) for name in members}
    _check_alike(folder, found)
    artefact = EnsembleArtefact(
        format_version=FORMAT_VERSION,
        shoulders_version=__version__,
        members={name: own.tensors_sha256 for name, own in found.items()},
        provenance=provenance,
    )
    card = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(_CARD)
    parameters = sum(own.trained_parameters for own in found.values())
    facts = {"members": members, "first": found[members[0]], "parameters": parameters}
    write_text(folder / "README.md", card.render(name=folder.name, **facts) + "\n")
    write_json(folder / ENSEMBLE, artefact.model_dump(mode="json"))
    return artefact


def read_ensemble(folder: Path) -> tuple[EnsembleArtefact, dict[str, Artefact]]:
    """Read and check `ensemble.json` and its members by name; loads no model.

    Raises `ArtefactError` naming the file and what is wrong with it.
    """
    artefact = read_versioned(folder, ENSEMBLE, EnsembleArtefact, FORMAT_VERSION, "ensemble")
    found = {}
    for name, wanted in artefact.members.items():
        _check_name(folder, name)
        found[name] = read_artefact(folder / name)
        if found[name].tensors_sha256 != wanted:
            raise ArtefactError(
                f"{folder / name}: is another skill than {ENSEMBLE} names; bring back the one that "
                "was joined, or join anew (shoulders.save_ensemble)"
            )
    _check_alike(folder, found)
    return artefact, found


def load_ensemble(
    folder: Path | str, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder] | None = None
) -> tuple[Ensemble, Templates]:
    """Load an ensemble onto the LM that its members were trained on, see `load_skill`.

    Args:
        folder: holds `ensemble.json` and the members' folders.
        lm: the frozen LM, loaded once for all.
        encoder: returns a frozen encoder by its name, for producers that need one.

    Returns:
        The ensemble, and its first member's templates.

    Raises:
        ArtefactError: it or a member is damaged, or bound to another LM or encoder.
    """
    folder, encoder = Path(folder), encoder or functools.cache(load_encoder)
    artefact, _ = read_ensemble(folder)
    loaded = [load_skill(folder / name, lm, encoder) for name in artefact.members]
    return Ensemble([skill for skill, _ in loaded]), loaded[0][1]


def _check_name(folder: Path, name: str) -> None:
    """Raise for what is no name of a folder inside `folder`."""
    if name in ("", ".", "..") or set(name) & {"/", "\\", "\0"}:
        raise ArtefactError(f"{folder / ENSEMBLE}: {name!r} is no folder inside its own")


def _check_alike(folder: Path, members: dict[str, Artefact]) -> None:
    """Raise for members that cannot answer together, without loading them; see `Ensemble`."""
    first_name, first = next(iter(members.items()))
    for name, one in members.items():
        if one.lm.fingerprint != first.lm.fingerprint:
            raise ArtefactError(
                f"{folder / name}: was trained on the LM '{one.lm.name}' (fingerprint "
                f"{one.lm.fingerprint}), {first_name} on {first.lm.fingerprint}"
            )
        if len(one.skill.passes) > 1:
            raise ArtefactError(f"{folder / name}: has several passes: members have one each")
        prefixes = [m.skill.format.answer_prefix for m in (one, first)]
        if prefixes[0] != prefixes[1]:
            raise ArtefactError(
                f"{folder / name}: begins answers with {prefixes[0]!r}, {first_name} with "
                f"{prefixes[1]!r}: members begin them alike"
            )
        if one.templates != first.templates:
            raise ArtefactError(
                f"{folder / name}: puts rows into other words than {first_name}: members have the "
                "same templates"
            )
    seen: dict[tuple[str, str], str] = {}
    for name, one in members.items():
        other = seen.setdefault((one.tensors_sha256, one.skill.model_dump_json()), name)
        if other != name:
            raise ArtefactError(
                f"{folder / name}: is the same skill as {other}, which would count twice: leave "
                "one of them out"
            )
