"""`shoulders info [SKILL_DIR | INDEX_DIR]`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoulders.cli.common import (
    check_outputs,
    emit_json,
    files_of,
    note_given,
    quiet_libraries,
    stdout,
)
from shoulders.cli.index import index_facts, show_index
from shoulders.skills.hub import local


def info(
    context: typer.Context,
    skill: Annotated[
        str | None,
        typer.Argument(help="A folder of a skill, an ensemble or an index. Default: the LM."),
    ] = None,
    lm: Annotated[str, typer.Option(help="LM: embedded, Hub id, folder, .gguf.")] = "embedded",
    json: Annotated[Path | None, typer.Option(help="Write the facts as JSON.")] = None,
) -> None:
    """Show what a skill, an index or the LM is: fingerprints, sizes, provenance."""
    folder = None if skill is None else Path(local(skill))
    check_outputs(json, read=files_of(str(folder)) if folder is not None else ())
    if folder is not None:
        note_given(context, ["lm"], "a skill's own is told")
    if folder is not None and _is_index(folder):
        index = {"index": str(folder), **_index_facts(folder)}
        emit_json(json, index)
        show_index(folder, index)
        return
    facts = _skill_facts(folder) if folder is not None else _lm_facts(lm)
    emit_json(json, facts)
    table = Table(show_header=False, title=escape(str(skill or lm)), title_justify="left")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), escape(_shown(value)))
    stdout().print(table)


def _is_index(folder: Path) -> bool:
    from shoulders.reader.index.manifest import FILE, UNFINISHED

    return (folder / FILE).is_file() or (folder / UNFINISHED).is_file()


def _index_facts(folder: Path) -> dict[str, Any]:
    """Return what the index holds, after a look at every byte of it."""
    from shoulders.reader.index.manifest import read_manifest, verify
    from shoulders.reader.index.plan import read_plan

    manifest = read_manifest(folder)
    verify(folder, manifest)
    plan = read_plan(folder)
    pending = plan is not None and plan.generation > manifest.generation
    unfinished = f"{plan.operation}: go on with --resume" if plan is not None and pending else None
    return {**index_facts(manifest), "verified": True, "unfinished": unfinished}


def _skill_facts(folder: Path) -> dict[str, Any]:
    from shoulders.skills.artefact import ENSEMBLE, read_artefact
    from shoulders.skills.reader_artefact import FILE as READER

    if (folder / ENSEMBLE).is_file():
        return _ensemble_facts(folder)
    artefact = read_artefact(folder)
    provenance = dict(artefact.provenance)
    facts: dict[str, Any] = {
        "skill": str(folder),
        "prompt": artefact.skill.passes[-1].prompt,
        "passes": [one.model_dump(mode="json", exclude_none=True) for one in artefact.skill.passes],
        "lm": artefact.lm.name,
        "lm_fingerprint": artefact.lm.fingerprint,
        "encoders": [e.model_dump() for e in artefact.encoders],
        "trained_parameters": artefact.trained_parameters,
        "frozen_parameters": artefact.lm.parameters + sum(e.parameters for e in artefact.encoders),
        "dtype": artefact.lm_dtype,
        "quantize": artefact.lm_quantize,
        "tasks": sorted(artefact.templates),
    }
    if (folder / READER).is_file():
        facts |= _reader_facts(folder)
        facts["frozen_parameters"] += facts["reader"]["frozen_parameters"]
    return {**facts, "provenance": provenance}


def _reader_facts(folder: Path) -> dict[str, Any]:
    """Return how a reader searches, re-ranks and reads; its files are checked."""
    from shoulders.skills.reader_artefact import read_reader

    artefact = read_reader(folder)
    similarity = artefact.similarity
    return {
        "reader": {
            "search": artefact.search.model_dump(mode="json"),
            "reading": artefact.reading.model_dump(mode="json"),
            "reranker": similarity.name if similarity else "trained" if artefact.files else None,
            "frozen_parameters": similarity.parameters if similarity else 0,
            "calibrated": artefact.reading.confidence is not None,
        }
    }


def _ensemble_facts(folder: Path) -> dict[str, Any]:
    from shoulders.skills.ensemble_artefact import read_ensemble

    artefact, members = read_ensemble(folder)
    facts = {name: _skill_facts(folder / name) for name in members}
    first = next(iter(facts.values()))
    encoders = {e["fingerprint"]: e for own in facts.values() for e in own["encoders"]}
    own = ("prompt", "encoders", "trained_parameters", "tasks")
    return {
        "ensemble": str(folder),
        "members": {name: {key: of[key] for key in own} for name, of in facts.items()},
        **{key: first[key] for key in ("lm", "lm_fingerprint", "dtype", "quantize")},
        "trained_parameters": sum(of["trained_parameters"] for of in facts.values()),
        "frozen_parameters": next(iter(members.values())).lm.parameters
        + sum(e["parameters"] for e in encoders.values()),
        "provenance": dict(artefact.provenance),
    }


def _lm_facts(name: str) -> dict[str, Any]:
    from shoulders.files import cache_folder
    from shoulders.lm.load import load_lm
    from shoulders.machine import machine

    quiet_libraries()
    lm = load_lm(name)
    return {
        "lm": lm.name,
        "architecture": type(lm.model).__name__,
        "lm_fingerprint": lm.fingerprint,
        "trained_parameters": 0,
        "frozen_parameters": lm.parameters,
        "dtype": lm.precision,
        "device": str(lm.device),
        "window": lm.max_positions,
        "hidden_size": lm.hidden_size,
        "weights": str(lm.model.name_or_path),  # for what else is to load it
        "cache": str(cache_folder()),
        "provenance": {"machine": machine()},
    }


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | dict | list):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(_shown(v) for v in value)
    return "\n".join(f"{k}: {_shown(v)}" for k, v in value.items() if k != "validations")
