"""Writes docs/cli.md from the command line itself: every verb with its options.

    .venv/bin/python docs/cli_reference.py

tests/test_docs.py fails where the page is not what this writes.
"""

from __future__ import annotations

import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

from typer.main import get_command

from shoulders.cli.app import app

PAGE = Path(__file__).resolve().parent / "cli.md"
HEAD = """# Commands

Written by `docs/cli_reference.py` from the command line; `shoulders VERB --help` says the same.
Exit codes: 0 done, 2 something to mend (one line on standard error says what), 130 Ctrl-C.
With `--json -` the JSON goes to standard output and all else to standard error.
"""


def page() -> str:
    """Return the whole page."""
    root: Any = get_command(app)
    parts = [HEAD]
    for name, command in root.commands.items():
        for verb, one in _verbs(name, command):
            parts.append(_section(verb, one))
    return "\n".join(parts)


def _verbs(name: str, command: Any) -> list[tuple[str, Any]]:
    """Return the command under its name, or those of a group under both."""
    if not hasattr(command, "commands"):
        return [(name, command)]
    return [(f"{name} {inner}", one) for inner, one in command.commands.items()]


def _section(verb: str, command: Any) -> str:
    hints = typing.get_type_hints(command.callback)
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join(p.name.upper() if p.required else f"[{p.name.upper()}]" for p in arguments)
    about = "\n".join(line.strip() for line in (command.help or "").strip().splitlines())
    lines = [
        f"## {verb}",
        "",
        about,
        "",
        "```text",
        f"shoulders {verb} {usage}".rstrip(),
        "```",
        "",
    ]
    if arguments:
        lines += ["| argument | value | |", "|---|---|---|"]
        lines += [
            f"| `{p.name.upper()}` | {_value(hints[p.name])} | {_text(p)} |" for p in arguments
        ]
        lines.append("")
    lines += ["| option | value | default | |", "|---|---|---|---|"]
    for p in options:
        value = "" if p.is_flag else _value(hints[p.name])
        names = ", ".join(f"`{name}`" for name in (*p.opts, *p.secondary_opts))
        lines.append(f"| {names} | {value} | {_default(p)} | {_text(p)} |")
    return "\n".join([*lines, ""])


def _value(hint: Any) -> str:
    """Return the kind of a value, from its type: `list[str] | None` is text."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(f"`{one.value}`" for one in hint)
    return {str: "text", Path: "path", int: "integer", float: "number"}[hint]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    shown = parameter.default is not None and parameter.default is not False
    return f"`{parameter.default}`" if shown else ""


def _text(parameter: Any) -> str:
    return (parameter.help or "").replace("|", r"\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
