"""Skills on disk: `skill.json`, `skill.safetensors`, `README.md`; JSON and safetensors only."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shoulders import __version__
from shoulders.data.templates import Templates
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.encoders.load import load_encoder
from shoulders.errors import ArtefactError, RecipeError, ShouldersError
from shoulders.files import atomic_path, sha256_of_file, write_json, write_text
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.quantized import Quantization
from shoulders.manifest import read_versioned
from shoulders.reader.calibration import Platt
from shoulders.skills.card import model_card
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill

FORMAT_VERSION = 1
FILE = "skill.json"
TENSORS = "skill.safetensors"
ENSEMBLE = "ensemble.json"  # in place of `FILE`: see `shoulders.skills.ensemble_artefact`


class Bound(BaseModel):
    """A frozen model that a skill is bound to, by the hash of its weights and tokenizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    fingerprint: str
    parameters: int


class Artefact(BaseModel):
    """What `skill.json` holds.

    `chat_template_sha256` is of a skill in the LM's chat format, whose frame is no part of the LM's
    fingerprint and may change with a revision on the Hub; earlier versions did not note it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    shoulders_version: str
    lm: Bound
    lm_dtype: str
    lm_quantize: Quantization | None = None
    encoders: tuple[Bound, ...]
    skill: SkillConfig
    templates: dict[str, list[str]]
    tensors_sha256: str
    trained_parameters: int
    gate: Platt | None = None
    provenance: dict[str, Any]
    chat_template_sha256: str | None = None


def save_skill(
    skill: Skill,
    folder: Path | str,
    templates: Templates,
    provenance: dict[str, Any],
    gate: Platt | None = None,
) -> Artefact:
    """Write a skill to `folder`; `skill.json` comes last, so that it names complete files.

    Args:
        skill: with something trained.
        folder: made where it is missing.
        templates: how rows of its tasks were put into words; they are loaded with it.
        provenance: facts for whoever asks later how it came to be; any JSON.
        gate: when a recursive skill's first answer is good enough, see `shoulders.skills.gate`.

    Returns:
        What `skill.json` holds.

    Raises:
        ArtefactError: the folder already holds a skill, or the skill has nothing trained.
        ShouldersError: the folder cannot be written.
    """
    folder = Path(folder)
    if not skill.networks():
        raise ArtefactError("the bare LM has nothing to save")
    if saved_in(folder).exists():
        raise ArtefactError(f"{folder}: already holds a skill; choose another folder")
    tensors = {
        name: value.detach().contiguous().cpu()
        for network in skill.networks()
        for name, value in network.state_dict().items()
    }
    with atomic_path(folder / TENSORS) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise ShouldersError(f"{folder / TENSORS}: cannot write: {error}") from error
        tensors_hash = sha256_of_file(temporary)
    artefact = Artefact(
        format_version=FORMAT_VERSION,
        shoulders_version=__version__,
        lm=_bound(skill.lm),
        lm_dtype=skill.lm.precision,
        lm_quantize=skill.lm.quantize,
        encoders=tuple(_bound(encoder) for encoder in skill.encoders()),
        skill=skill.config,
        templates=templates.as_dict(),
        tensors_sha256=tensors_hash,
        trained_parameters=skill.trained_parameters,
        gate=gate,
        provenance=provenance,
        chat_template_sha256=_chat_template(skill),
    )
    write_text(folder / "README.md", model_card(folder.name, artefact.model_dump(mode="json")))
    write_json(folder / FILE, artefact.model_dump(mode="json"))
    return artefact


def saved_in(folder: Path) -> Path:
    """Return the file that comes last in a folder of a skill or of an ensemble, there or not."""
    joined = folder / ENSEMBLE
    return joined if joined.is_file() else folder / FILE


def read_artefact(folder: Path) -> Artefact:
    """Read and check `skill.json` and the hash of the tensors; loads no model.

    Raises `ArtefactError` naming the file and what is wrong with it.
    """
    if not folder.is_dir():
        raise ArtefactError(f"{folder}: no such skill folder")
    if (folder / ENSEMBLE).is_file() and not (folder / FILE).is_file():
        raise ArtefactError(f"{folder}: holds an ensemble; one of its members is asked for here")
    try:
        artefact = read_versioned(folder, FILE, Artefact, FORMAT_VERSION, "skill")
    except RecipeError as error:  # a kind of producer that is not installed here
        raise ArtefactError(f"{folder / FILE}: {error}") from error
    tensors = folder / TENSORS
    if not tensors.is_file():
        raise ArtefactError(f"{tensors}: missing")
    found = sha256_of_file(tensors)
    if found != artefact.tensors_sha256:
        raise ArtefactError(
            f"{tensors}: damaged or edited: sha256 {found[:16]}..., "
            f"{FILE} says {artefact.tensors_sha256[:16]}..."
        )
    return artefact


def load_skill(
    folder: Path | str, lm: FrozenLM, encoder: Callable[[str], FrozenEncoder] | None = None
) -> tuple[Skill, Templates]:
    """Load a skill onto the LM it was trained on.

    Args:
        folder: as written by `save_skill`.
        lm: the frozen LM.
        encoder: loads a frozen encoder by name, `load_encoder` by default; give a cached one
            where several skills share encoders.

    Returns:
        The skill, and the templates that put its tasks' rows into words.

    Raises:
        ArtefactError: the folder is damaged, or bound to another LM or encoder (the message
            holds both fingerprints).

    >>> lm = load_lm("embedded")  # doctest: +SKIP
    >>> skill, templates = load_skill(Path("runs/skill"), lm)  # doctest: +SKIP
    >>> skill.generate(["What is the opposite of hot?"], DecodingConfig())  # doctest: +SKIP
    """
    folder, encoder = Path(folder), encoder or functools.cache(load_encoder)
    artefact = read_artefact(folder)
    _check_bound(folder, "LM", artefact.lm, lm.name, lm.fingerprint)
    skill = Skill.create(lm, artefact.skill, encoder)
    noted, found = artefact.chat_template_sha256, _chat_template(skill)
    if noted is not None and noted != found:
        raise ArtefactError(
            f"{folder}: was trained in another chat template of '{lm.name}' (SHA-256 "
            f"{noted[:16]}..., this one's is {str(found)[:16]}...); load the LM's revision that "
            "has it"
        )
    encoders = list(skill.encoders())
    if len(artefact.encoders) != len(encoders):
        raise ArtefactError(
            f"{folder / FILE}: names {len(artefact.encoders)} encoders, its passes have "
            f"{len(encoders)}; it was edited"
        )
    for bound, own in zip(artefact.encoders, encoders, strict=True):
        _check_bound(folder, "encoder", bound, own.name, own.fingerprint)
    try:
        tensors = load_file(folder / TENSORS)
        if broken := next((n for n, v in tensors.items() if not v.isfinite().all()), None):
            raise RuntimeError(f"'{broken}' is not finite")
        for network in skill.networks():
            held = {name: tensors.pop(name) for name in network.state_dict() if name in tensors}
            network.load_state_dict(held)
            network.train(False)
        if tensors:
            raise RuntimeError(f"unexpected {', '.join(sorted(tensors))}")
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ArtefactError(f"{folder / TENSORS}: does not fit {FILE}: {reason}") from error
    return skill, Templates.from_dict(artefact.templates, source=str(folder / FILE))


def frozen_parts(skill: Skill) -> dict[str, Any]:
    """Return the fingerprints of what a skill is trained around: its LM, template and encoders."""
    return {
        "lm": skill.lm.fingerprint,
        "encoders": [encoder.fingerprint for encoder in skill.encoders()],
        "chat_template": _chat_template(skill),
    }


def _chat_template(skill: Skill) -> str | None:
    """Return the hash of the chat template that a skill reads inputs in, None for another one."""
    if not skill.config.format.chat:
        return None
    return hashlib.sha256(str(skill.lm.tokenizer.chat_template).encode()).hexdigest()


def _bound(frozen: FrozenLM | FrozenEncoder) -> Bound:
    return Bound(name=frozen.name, fingerprint=frozen.fingerprint, parameters=frozen.parameters)


def _check_bound(folder: Path, what: str, bound: Bound, name: str, fingerprint: str) -> None:
    if bound.fingerprint != fingerprint:
        raise ArtefactError(
            f"{folder}: was trained on the {what} '{bound.name}' (fingerprint "
            f"{bound.fingerprint}), not on '{name}' (fingerprint {fingerprint})"
        )
