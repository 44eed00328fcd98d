"""Reading rows (task, input, targets) from JSONL, Parquet and saved `datasets` folders."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoulders.errors import DataError, install, nearest
from shoulders.lines import check_encodable, json_lines, kind_of, meant_by, refuse_slips

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


def _row(fields: Mapping[str, Any], where: str, default_task: str) -> Row:
    """Check one row given as JSON-like fields; an optional field may be null."""
    refuse_slips(fields, _FIELDS, where)
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


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: '{field}' must be a text, not {kind_of(value)}{_quote(value)}")
    if not value.strip():
        raise DataError(f"{where}: '{field}' is empty; fill it in or remove the row")
    check_encodable(value, f"{where}: '{field}'")
    return value


def checked_texts(value: Any, field: str, where: str) -> tuple[str, ...]:
    """Return a field's list of texts; raises `DataError` for anything else, or an empty text."""
    if not isinstance(value, list):
        hint = "; use 'target' for one text" if field == "targets" else ""
        raise DataError(f"{where}: '{field}' must be a list of texts, not {kind_of(value)}{hint}")
    if not value:
        raise DataError(f"{where}: '{field}' is an empty list; give at least one text")
    return tuple(_text(item, f"{field}[{index}]", where) for index, item in enumerate(value))


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
        columns = [n for n in names if n in _FIELDS or meant_by(n, _FIELDS)]
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
