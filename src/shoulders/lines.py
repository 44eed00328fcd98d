"""Reading the JSON that people write, most of it one object a line; errors name file and line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from shoulders.errors import DataError

MARK = b"\xef\xbb\xbf"  # ahead of what some editors save as UTF-8


def json_lines(path: Path, what: str = "a row") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every JSON object of a file with one a line, and where it stands, for messages.

    Blank lines are skipped. Raises `DataError` for a line that is no object; `what` says there what
    one is called.
    """
    # Read as bytes: text mode would name no line for bad UTF-8, and would also break lines at
    # U+2028, which JSON allows inside a text.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(MARK) if number == 1 else raw
                if line.strip():
                    where = f"{path}:{number}"
                    text = decoded(line.rstrip(), path, number)
                    yield json_object(parsed(text, path, number), where, what), where
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error


def decoded(raw: bytes, path: Path, line: int = 1) -> str:
    """Return a piece of a file that begins at `line` as text, or raise `DataError`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        byte = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not valid UTF-8 at byte {byte}; save the file as UTF-8"
        ) from None


def parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Return the JSON value of a line, or of a whole file (`line` is None), or raise `DataError`.

    Refused are also what JSON does not have (`NaN`) and a field that is given twice.
    """
    where = str(path) if line is None else f"{path}:{line}"
    try:
        return json.loads(text, parse_constant=_refuse, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        place = f"{path}:{(line or 1) + error.lineno - 1}"
        reason = f"{error.msg} at column {error.colno}"
        raise DataError(f"{place}: not valid JSON: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from None


def json_object(value: Any, where: str, what: str = "a row") -> dict[str, Any]:
    """Return `value` if it is an object, or raise `DataError`."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {what} must be a JSON object, not {kind_of(value)}")
    return value


def kind_of(value: Any) -> str:
    """Name a value's type as JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def check_encodable(text: str, what: str) -> None:
    """Raise `DataError` for text that no tokenizer takes and no file holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{what} holds half a surrogate pair (\\ud800-\\udfff); repair the text"
        ) from None


def refuse_slips(fields: Collection[str], known: Collection[str], where: str) -> None:
    """Raise `DataError` for a field that is a known one misspelt; others are people's own."""
    for name in fields:
        if meant := meant_by(name, known):
            raise DataError(f"{where}: unknown field '{name}' (did you mean '{meant}'?)")


def meant_by(name: str, known: Collection[str]) -> str | None:
    """Return the known field that an unknown one is meant to be; None for `id`, `metadata`..."""
    if name in known:
        return None
    lowered = name.lower()
    # Nearer than 'tags' is to 'task', 'optional' to 'options', 'task_id' to 'task': fields of
    # people's own.
    near = [field for field in known if _slip(lowered, field)]
    close = difflib.get_close_matches(lowered, near, n=1, cutoff=0)
    return close[0] if close else None


def _slip(word: str, known: str) -> bool:
    """Tell whether `word` is `known` with a letter wrong, missing or too many, or two swapped.

    Never the first one, nor one wrong of four: `mask` and `tank` are not meant to be `task`.
    """
    pairs = enumerate(zip(word, known, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(word), len(known)))
    here, there = word[same:], known[same:]
    wrong = here[1:] == there[1:] and (len(known) > 4 or word == known)
    swapped = here[:2] == there[1::-1] and here[2:] == there[2:]
    return same > 0 and (wrong or swapped or here[1:] == there or here == there[1:])


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands there twice")
    return found
