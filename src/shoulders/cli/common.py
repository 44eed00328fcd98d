"""What several commands share: consoles, loading a skill by name, quiet libraries, JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from shoulders.errors import ShouldersError
from shoulders.files import STANDARD_OUTPUT, as_json, check_writable, write_json

if TYPE_CHECKING:
    from shoulders.cli.options import LMChoice
    from shoulders.data.templates import Templates
    from shoulders.skills.ensemble import Ensemble
    from shoulders.skills.gate import Gated
    from shoulders.skills.skill import Skill

BASE = "base"


def stdout() -> Console:
    """Return the console for results.

    Texts of users' may hold `:smile:`, which stays as it is; what may hold `[brackets]` has to be
    escaped where it is printed.
    """
    return Console(emoji=False)


def stderr() -> Console:
    """Return the console for progress and notes, which machines do not read."""
    return Console(stderr=True, emoji=False)


def quiet_imports() -> None:
    """Keep quiet what libraries say at import, or decide there to say later.

    torchao, which transformers imports wherever it is installed, tells which of its parts are for
    other machines; tqdm reads once whether bars are wanted, which in a log file nobody does.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    for library in ("torchao", "torch.utils._pytree"):
        getLogger(library).setLevel(ERROR)


def quiet_libraries() -> None:
    """Keep the model library's own progress bars and notices out of our output."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    quiet_imports()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def open_skill(
    name: str, choice: LMChoice, *, templates: Path | None = None, remote: bool = False
) -> tuple[Skill | Ensemble, Templates]:
    """Load `base` or a folder of a skill or an ensemble, with its templates or those of a file.

    A skill runs on the LM, in the precision and as quantised as it was trained with unless
    `choice` says otherwise; `remote` where a server runs it, see `LMChoice.load`.
    """
    from shoulders.data.templates import Templates
    from shoulders.skills.load import load, read_first
    from shoulders.skills.skill import Skill

    quiet_libraries()
    chosen = Templates.read(templates) if templates else None
    if name == BASE:
        return Skill.base(choice.load(remote=remote)), chosen or Templates()
    skill, own = load(name, choice.load(read_first(Path(name)), remote=remote))
    return skill, chosen or own


def one_skill(skill: Skill | Ensemble, name: str) -> Skill:
    """Return a skill; raises `ShouldersError` for an ensemble, which cannot do what is asked."""
    from shoulders.skills.skill import Skill

    if isinstance(skill, Skill):
        return skill
    raise ShouldersError(
        f"{name}: is an ensemble, which answers rows; for this, name one of its members"
    )


def gated(
    skill: Skill | Ensemble, name: str, recurse_below: float | None
) -> Skill | Ensemble | Gated:
    """Return a skill that recurses only below a confidence; itself, where None is asked for.

    Raises `ShouldersError` for a skill that has no calibrated gate.
    """
    if recurse_below is None:
        return skill
    from shoulders.skills.artefact import read_artefact
    from shoulders.skills.gate import Gated
    from shoulders.skills.skill import Skill

    one = isinstance(skill, Skill) and name != BASE
    gate = read_artefact(Path(name)).gate if one else None
    if gate is None or not isinstance(skill, Skill):
        raise ShouldersError(
            f"--recurse-below: '{name}' has no calibrated gate; it needs two passes or more, and "
            "validation rows with right and wrong answers"
        )
    return Gated(skill, gate, recurse_below)


def provenance(skill: Skill | Ensemble, name: str, data: Path) -> dict[str, Any]:
    """Return what every result says of where it comes from: what was asked, when, and on what."""
    from datetime import UTC, datetime

    from shoulders.machine import machine

    lm = skill.lm
    return {
        "skill": name,
        "data": str(data),
        "trained_parameters": skill.trained_parameters,
        "lm": {"name": lm.name, "fingerprint": lm.fingerprint, "quantize": lm.quantize},
        "dtype": lm.precision,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def note_given(context: typer.Context, options: Iterable[str], why: str) -> None:
    """Say on standard error that these options, where they were given, do nothing here."""
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [n for n, source in sources.items() if source and source.name == "COMMANDLINE"]
    if given:
        shown = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        stderr().print(f"note: {shown} does nothing here: {why}", markup=False, highlight=False)


def check_argument(text: str, name: str) -> None:
    """Raise `ShouldersError` for an argument of bytes that are no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ShouldersError(f"{name} is not valid UTF-8") from None


def files_of(skill: str) -> list[Path]:
    """Return the files of a skill's folder and of its members', which no output may replace."""
    folder = Path(skill)
    return [] if skill == BASE else [*folder.glob("*"), *folder.glob("*/*")]


def check_outputs(
    json: Path | None, *files: Path | None, read: Iterable[Path | str | None] = ()
) -> None:
    """Raise `ShouldersError` now for what could not be written later; JSON alone may go to `-`.

    Nor may two outputs be one file, or one of them what is `read`.
    """
    outputs = [p for p in (None if json == STANDARD_OUTPUT else json, *files) if p is not None]
    taken = {Path(path).resolve() for path in read if path is not None}
    for path in outputs:
        if path.is_file() or not path.exists():  # no device, such as /dev/null
            if path.resolve() in taken:
                raise ShouldersError(f"{path}: would be overwritten; write to another file")
            taken.add(path.resolve())
        check_writable(path)


def emit_json(path: Path | None, value: dict[str, Any]) -> None:
    """Write the machine-readable result where one was asked for; `-` is standard output."""
    if path == STANDARD_OUTPUT:
        # `sys.stdout` is standard error by now: see `shoulders.cli.app`.
        out = sys.__stdout__
        assert out is not None
        out.flush()
        out.buffer.write(as_json(value).encode())  # JSON is UTF-8, whatever the locale
        out.buffer.flush()
    elif path is not None:
        write_json(path, value)
