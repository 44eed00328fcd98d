"""Tables of passages: DPR's `psgs_w100.tsv` and JSONL (BEIR's, or our own), plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shoulders.errors import DataError, nearest
from shoulders.lines import (
    MARK,
    check_encodable,
    decoded,
    json_object,
    kind_of,
    parsed,
    refuse_slips,
)
from shoulders.reader.collections.source import Estimate, Note, Sourced
from shoulders.reader.passage import Passage

MAX_LINE = 16_000_000  # bytes; a longer line is no row of a table of passages
_COLUMNS = ("id", "text", "title")
_SAMPLED = 1000  # lines that an estimate looks at
_GZIP_RATIO = 3  # of English text


class DprTable:
    """A table with the columns `id`, `text`, `title` (in any order) divided by tabs, and a header.

    DPR quotes a text as `csv` does: in `"`, with every `"` inside doubled. Other writers of the
    same table do not quote at all, so that a text may begin with `"`: a field counts as quoted
    only where it is wholly so.
    """

    kind = "dpr"

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, note: Note) -> Iterator[Sourced]:
        """Yield the passages, row by row; those without text or title are left out and noted."""
        return _with_words(self.path, self._rows(), note)

    def _rows(self) -> Iterator[Sourced]:
        order: list[int] = []
        for number, line in _lines(self.path):
            where = f"{self.path}:{number}"
            fields = line.split("\t")
            if not order:
                order = _columns(fields, where)
                continue
            if len(fields) != len(_COLUMNS):
                raise DataError(
                    f"{where}: {len(fields)} columns, expected {len(_COLUMNS)} divided by tabs "
                    f"({', '.join(_COLUMNS)}); a passage stands in one line"
                )
            id_, text, title = (_unquoted(fields[i]) for i in order)
            yield Sourced(_checked(Passage(id_, title, text), where), where)

    def estimate(self) -> Estimate:
        """Guess the number of rows from the length of the first ones."""
        return _estimate(self.path)


class JsonLines:
    """One object a line: BEIR's `_id, title, text`, or our own `id, title, text, source`."""

    kind = "jsonl"

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, note: Note) -> Iterator[Sourced]:
        """Yield the passages, line by line; blank lines are skipped.

        Passages without text or title, as published collections have some, are left out and noted.
        """
        return _with_words(self.path, self._rows(), note)

    def _rows(self) -> Iterator[Sourced]:
        for number, line in _lines(self.path):
            if line.strip():
                where = f"{self.path}:{number}"
                value = json_object(parsed(line, self.path, number), where, "a passage")
                yield Sourced(_checked(_json_passage(value, where), where), where)

    def estimate(self) -> Estimate:
        """Guess the number of rows from the length of the first ones."""
        return _estimate(self.path)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends; `DataError` names a bad line."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise DataError(
                        f"{path}:{number}: a line of over {MAX_LINE:,} bytes; this is no table of "
                        "passages (a document is cut into passages where it is a .txt file)"
                    )
                line = raw.removeprefix(MARK) if number == 1 else raw
                yield number, decoded(line, path, number).rstrip("\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file after line {number} ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error


def _columns(header: list[str], where: str) -> list[int]:
    """Return the places of `_COLUMNS` in the header."""
    names = [name.strip().lower() for name in header]
    if sorted(names) != sorted(_COLUMNS):
        raise DataError(
            f"{where}: the first line must name the columns {', '.join(_COLUMNS)}, divided by "
            f"tabs; found {', '.join(repr(name[:40]) for name in names[:6])}"
        )
    return [names.index(name) for name in _COLUMNS]


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"':
        inside = field[1:-1]
        if '"' not in inside.replace('""', ""):
            return inside.replace('""', '"')
    return field


def _json_passage(value: dict[str, Any], where: str) -> Passage:
    refuse_slips(value, {"title", "text", "source"} - value.keys(), where)
    key = "_id" if "_id" in value else "id"
    id_ = value.get(key)
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)
    if not isinstance(id_, str):
        raise DataError(f"{where}: no text in field 'id' or '_id'{nearest('id', value)}")
    check_encodable(id_, f"{where}: field '{key}'")
    return Passage(
        id_,
        _text(value, "title", where, optional=True),
        _text(value, "text", where),
        _text(value, "source", where, optional=True),
    )


def _text(value: dict[str, Any], key: str, where: str, *, optional: bool = False) -> str:
    text = value.get(key)
    if text is None and optional:
        return ""
    if text is None:
        raise DataError(f"{where}: no text in field '{key}'{nearest(key, value)}")
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{key}' must be a text, not {kind_of(text)}")
    check_encodable(text, f"{where}: field '{key}'")
    return text


def _checked(passage: Passage, where: str) -> Passage:
    if not passage.id.strip():
        raise DataError(f"{where}: an empty id")
    return passage


def _with_words(path: Path, rows: Iterator[Sourced], note: Note) -> Iterator[Sourced]:
    """Yield the passages that say something; note how many do not, and the first of them."""
    empty, first = 0, ""
    for sourced in rows:
        if sourced.passage.text.strip() or sourced.passage.title.strip():
            yield sourced
        else:
            first = first or f"{sourced.place}, '{sourced.passage.id}'"
            empty += 1
    if empty:
        note(f"{path.name}: {empty} passages have neither text nor title: left out ({first} first)")


def _estimate(path: Path) -> Estimate:
    size = path.stat().st_size * (_GZIP_RATIO if path.suffix.lower() == ".gz" else 1)
    lengths: list[int] = []
    try:
        with _open(path) as file:
            while len(lengths) < _SAMPLED and (raw := file.readline(MAX_LINE)):
                lengths.append(len(raw))
    except (OSError, EOFError, zlib.error):
        pass  # reading it in earnest will say what is wrong
    mean = sum(lengths) / len(lengths) if lengths else 1.0
    return Estimate(round(size / max(mean, 1.0)), size)
