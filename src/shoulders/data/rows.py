"""Reading rows (task, input, targets) from JSONL, Parquet and saved `datasets` folders."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoulders.errors import DataError, install, nearest

_FIELDS = ("task", "input", "target", "targets", "options")
_P3_INPUT, _P3_TARGET, _P3_OPTIONS = (
    "inputs_pretokenized",
    "targets_pretokenized",
    "answer_choices",
)
_SPLITS = ("train", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """One example: any one of `targets` is a right answer to `input`.

    `options` holds the answer choices when the task is to choose among them (rank
    classification), else None. `where` it stands (file and line, or number in a table), for
    messages: rows are equal wherever they stand.
    """

    task: str
    input: str
    targets: tuple[str, ...]
    options: tuple[str, ...] | None = None
    where: str | None = field(default=None, compare=False, repr=False)


def read_rows(path: Path | str, *, task: str | None = None) -> list[Row]:
    """Read every row of `path`, in file order.

    `path` is a `.jsonl` file, a `.parquet` file, a folder of Parquet files of one split, or one
    split as `datasets` writes it with `save_to_disk`. Tables have either P3's columns
    (`inputs_pretokenized`, `targets_pretokenized`, optional `answer_choices`; text is stripped)
    or the same fields as JSONL: `input`, `targets` (list) or `target` (text), and optionally
    `task` and `options`; lines with a `question` and its `answers`, as open questions are
    published, are read as such. Rows without a task belong to `task`, by default the name of the
    file without its suffix, or of the folder.

    Raises `DataError`, naming file and line, for anything that is not such a row.
    """
    path = Path(path)
    default = task or task_of(path)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path in the recipe")
    if path.is_dir() or path.suffix == ".parquet":
        rows = list(_table_rows(path, default))
    elif path.suffix == ".jsonl":
        rows = list(_jsonl_rows(path, default))
    else:
        raise DataError(f"{path}: cannot read '{path.suffix}' files; use .jsonl or .parquet")
    if not rows:
        raise DataError(f"{path}: holds no rows; add some or leave the file out")
    return rows


def task_of(path: Path | str) -> str:
    """Return the task of a file's or folder's rows that name none: what it is called."""
    path = Path(path)
    return path.name if path.is_dir() else path.stem


def _jsonl_rows(path: Path, default_task: str) -> Iterator[Row]:
    for fields, where in json_lines(path):
        yield _row(fields, where, default_task)


def json_lines(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yield every JSON object of a file with one a line, and where it stands, for messages.

    Raises `DataError` for a line that is none.
    """
    # Read as bytes: text mode would name no line for bad UTF-8, and would also break lines at
    # U+2028, which JSON allows inside a text.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw.strip():
                    yield _parse(raw, where), where
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error


def _parse(raw: bytes, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(
            raw.rstrip().decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_once
        )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        column = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{where}: not valid JSON: {reason}{column}") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be a JSON object, not {_kind(value)}")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' stands there twice")
    return found


def _row(fields: Mapping[str, Any], where: str, default_task: str) -> Row:
    """Check one row given as JSON-like fields; an optional field may be null."""
    for name in fields:
        if typo_of := _typo_of(name):
            raise DataError(f"{where}: unknown field '{name}' (did you mean '{typo_of}'?)")
    given = {name: value for name, value in fields.items() if value is not None}
    if "question" in given and "answers" in given and "input" not in given:
        if other := {"target", "targets"} & given.keys():
            raise DataError(f"{where}: both 'answers' and '{other.pop()}'; keep one")
        given |= {"input": given["question"], "targets": given["answers"]}
    if "input" not in given:
        raise DataError(f"{where}: no field 'input'{nearest('input', given)}")
    if "targets" in given and "target" in given:
        raise DataError(f"{where}: both 'target' and 'targets'; keep one")
    if "targets" in given:
        targets = checked_texts(given["targets"], "targets", where)
    elif "target" in given:
        targets = (_text(given["target"], "target", where),)
    else:
        raise DataError(f"{where}: no field 'targets'{nearest('targets', given)}")
    options = checked_texts(given["options"], "options", where) if "options" in given else None
    if options is not None and not set(options) & set(targets):
        raise DataError(f"{where}: none of 'targets' is among 'options'; add it to 'options'")
    return Row(
        task=_text(given.get("task", default_task), "task", where),
        input=_text(given["input"], "input", where),
        targets=targets,
        options=options,
        where=where,
    )


def _typo_of(name: str) -> str | None:
    """Return the known field that an unknown one is meant to be; None for `id`, `metadata`..."""
    if name in _FIELDS:
        return None
    lowered = name.lower()
    # Nearer than 'tags' is to 'task', 'optional' to 'options', 'task_id' to 'task': fields of
    # people's own.
    near = [known for known in _FIELDS if _slip(lowered, known)]
    close = difflib.get_close_matches(lowered, near, n=1, cutoff=0)
    return close[0] if close else None


def _slip(word: str, known: str) -> bool:
    """Tell whether `word` is `known` with one letter wrong, missing or too many, or reordered."""
    if sorted(word) == sorted(known):
        return True
    pairs = enumerate(zip(word, known, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(word), len(known)))
    here, there = word[same:], known[same:]
    return here[1:] == there[1:] or here[1:] == there or here == there[1:]


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be a text, not {_kind(value)}{_quote(value)}")
    if not value.strip():
        raise DataError(f"{where}: '{field}' is empty; fill it in or remove the row")
    check_encodable(value, f"{where}: '{field}'")
    return value


def check_encodable(text: str, what: str) -> None:
    """Raise `DataError` for text that no tokenizer takes and no file holds."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{what} holds half a surrogate pair (\\ud800-\\udfff); repair the text"
        ) from None


def checked_texts(value: Any, field: str, where: str) -> tuple[str, ...]:
    """Return a field's list of texts; raises `DataError` for anything else, or an empty text."""
    if not isinstance(value, list):
        hint = "; use 'target' for one text" if field == "targets" else ""
        raise DataError(f"{where}: '{field}' must be a list of texts, not {_kind(value)}{hint}")
    if not value:
        raise DataError(f"{where}: '{field}' is an empty list; give at least one text")
    return tuple(_text(item, f"{field}[{index}]", where) for index, item in enumerate(value))


def _kind(value: Any) -> str:
    """Name a value's type as JSON calls it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _quote(value: Any) -> str:
    """Tell how to write a number as a text: converting it silently could change '1.0' to '1'."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return f'; write it in quotes: "{value}"' if number else ""


def _table_rows(path: Path, default_task: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a folder of them, or a saved `datasets` split."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading tables needs pyarrow; run: {install('data')}") from None
    for file in _table_files(path):
        try:
            if file.suffix == ".parquet":
                with pq.ParquetFile(file) as table:
                    columns, make = _columns(table.schema_arrow.names, file, default_task)
                    yield from _made(table.iter_batches(columns=columns), make, file)
            else:
                # `datasets` writes Arrow's streaming format, without the footer of Arrow files.
                with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as table:
                    columns, make = _columns(table.schema.names, file, default_task)
                    yield from _made((batch.select(columns) for batch in table), make, file)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{file}: cannot read this table: {reason}") from error


def _made(batches: Any, make: Callable[[dict[str, Any], str], Row | None], file: Path) -> Any:
    number = 0
    for batch in batches:
        for fields in batch.to_pylist():
            number += 1
            row = make(fields, f"{file}: row {number}")
            if row is not None:
                yield row


def _table_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    state = path / "state.json"
    if state.is_file():
        # The folder may also hold caches (cache-*.arrow); only `state.json` knows the data.
        try:
            entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            return [path / entry["filename"] for entry in entries]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{state}: names no data files; save the dataset again") from None
    splits = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
    if splits:
        raise DataError(f"{path}: holds several splits; name one of them: {', '.join(splits)}")
    files = sorted(path.glob("*.parquet"))
    if not files:
        raise DataError(f"{path}: no .parquet files and no saved dataset in this folder")
    # Reading a whole folder must never mix a test split into training.
    # At the beginning of a name, or at its end before the number of a part: `unit_test_repair` is
    # a task.
    split = f"({'|'.join(_SPLITS)})"
    pattern = re.compile(rf"^{split}(?![a-z0-9])|(?<![a-z0-9]){split}([-_.]\d.*)?$")
    matches = [pattern.search(file.stem.lower()) for file in files]
    found = {m[1] or m[2] if m else "" for m in matches}
    if len(found) > 1:
        names = ", ".join(sorted(name or "others" for name in found))
        raise DataError(f"{path}: holds several splits ({names}); name the files one by one")
    return files


def _columns(
    names: list[str], file: Path, default_task: str
) -> tuple[list[str], Callable[[dict[str, Any], str], Row | None]]:
    """Return the columns to read, and the function that makes a row of their values."""
    # P3 first: its tables also have columns `inputs` and `targets`, which hold token ids.
    if _P3_INPUT in names and _P3_TARGET in names:
        wanted = (_P3_INPUT, _P3_TARGET, _P3_OPTIONS, "is_correct")
        return [n for n in wanted if n in names], lambda f, where: _p3_row(f, where, default_task)
    if "input" in names and ("targets" in names or "target" in names):
        columns = [n for n in names if n in _FIELDS or _typo_of(n)]
        return columns, lambda f, where: _row(f, where, default_task)
    raise DataError(
        f"{file}: needs the columns {_P3_INPUT} and {_P3_TARGET}, or input and targets;"
        f" found {', '.join(names)}"
    )


def _p3_row(fields: Mapping[str, Any], where: str, task: str) -> Row | None:
    # P3's `*_score_eval` tables hold a row for every choice, wrong ones too.
    if fields.get("is_correct") is False:
        return None
    options = fields.get(_P3_OPTIONS)
    target = _text(fields[_P3_TARGET], _P3_TARGET, where).strip()
    return Row(
        task=task,
        input=_text(fields[_P3_INPUT], _P3_INPUT, where).strip(),
        targets=(target,),
        options=tuple(text.strip() for text in checked_texts(options, _P3_OPTIONS, where))
        if options  # P3 writes an empty list where a prompt has no choices
        else None,
        where=where,
    )


def as_line(row: Row) -> str:
    """Return a row as `read_rows` reads it again: one line of JSON."""
    value: dict[str, Any] = {"task": row.task, "input": row.input, "targets": list(row.targets)}
    if row.options:
        value["options"] = list(row.options)
    return json.dumps(value, ensure_ascii=False) + "\n"
