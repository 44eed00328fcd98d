"""The rows of a file and their answers, which are kept as they come: `generate --input`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoulders.data.rows import Row, checked_texts
from shoulders.errors import DataError, ShouldersError
from shoulders.files import atomic_path, is_special, writing_to
from shoulders.lines import check_encodable, json_lines

if TYPE_CHECKING:
    from shoulders.data.templates import Templates

KEPT = ".answered"  # behind the output's name, while answers are missing
TOGETHER = 512  # rows: many enough for batches of equal length, half a minute on two cores
Output = list[dict[str, Any]]


def read_inputs(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows with an input, their other fields carried along, and where each stands."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    rows, places = [], []
    for fields, where in json_lines(path):
        text, task = fields.get("input"), fields.get("task")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f'{where}: each line needs a non-empty text "input"')
        if task is not None and not isinstance(task, str):
            raise DataError(f'{where}: "task" must be a text')
        if task is not None and fields.get("options") is not None:
            checked_texts(fields["options"], "options", where)
        # All of it is written again.
        check_encodable(json.dumps(fields, ensure_ascii=False), f"{where}: the row")
        rows.append(dict(fields))
        places.append(where)
    if not rows:
        raise DataError(f"{path}: is empty; each line needs an object with an input")
    return rows, places


def rendered(row: dict[str, Any], templates: Templates) -> str:
    """Return a row's input as the skill reads it: as `eval` renders it, where it names a task."""
    if row.get("task") is None:
        return str(row["input"])
    options = row.get("options")
    return templates.render(
        Row(row["task"], row["input"], (), None if options is None else tuple(options))
    )


def write_answers(output: Path, rows: Sequence[dict[str, Any]], found: Sequence[Output]) -> None:
    """Write each row with its outputs, atomically."""
    with atomic_path(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row, outputs in zip(rows, found, strict=True):
            file.write(json.dumps({**row, "outputs": outputs}, ensure_ascii=False) + "\n")


class Kept:
    """Answers beside an output that is not whole yet.

    They are found by the text that was read, on which alone they depend (samples too): rows may be
    mended, added and put into another order before a run goes on.

    Args:
        output: what will hold all of them.
        asked: what else answers depend on: the skill, how it is asked.
        resume: whether to go on from what a stopped run has kept.

    Raises:
        ShouldersError: a stopped run's answers are there and are not to be gone on from, or are of
            another skill, or asked for otherwise.
    """

    def __init__(self, output: Path, asked: dict[str, Any], *, resume: bool) -> None:
        self.path = output.with_name(output.name + KEPT)
        self._lasting = not is_special(output)
        self._asked = json.loads(json.dumps(asked))
        self.found: dict[str, Output] = {}
        if not self._lasting or not self.path.exists():
            return
        if not resume:
            raise ShouldersError(
                f"{self.path}: holds the answers of a run that was stopped; go on with --resume, "
                "or delete it"
            )
        head, *lines = self._read() or [self._asked]
        if other := sorted(k for k in self._asked if head.get(k) != self._asked[k]):
            raise ShouldersError(
                f"{self.path}: its answers were asked for with another {', '.join(other)}; give "
                "what was given then, or delete it"
            )
        self.found = {line["text"]: line["outputs"] for line in lines}

    def _read(self) -> list[dict[str, Any]]:
        """Return the file's lines, without one that a kill has left half-written."""
        with writing_to(self.path), self.path.open("r+b") as file:
            whole = file.read()
            whole = whole[: whole.rfind(b"\n") + 1]
            file.truncate(len(whole))
        if not whole:
            self.path.unlink()
        return [dict(fields) for fields, _ in json_lines(self.path)] if whole else []

    def missing(self, texts: Sequence[str], together: int) -> Iterator[list[str]]:
        """Yield what is not answered yet, each text once, so many at a time."""
        left = [text for text in dict.fromkeys(texts) if text not in self.found]
        for start in range(0, len(left), together):
            yield left[start : start + together]

    def add(self, texts: Sequence[str], outputs: Sequence[Output]) -> None:
        """Keep answers, at the end of the file."""
        if self._lasting:
            with writing_to(self.path):
                new = not self.path.exists()
                with self.path.open("a", encoding="utf-8") as file:
                    ahead = [self._asked] if new else []
                    for value in [*ahead, *map(_line, texts, outputs)]:
                        file.write(json.dumps(value, ensure_ascii=False) + "\n")
        self.found.update(zip(texts, outputs, strict=True))

    @contextmanager
    def telling(self, say: Callable[[str], None]) -> Iterator[None]:
        """Say what is kept where answering stops early; throw it away where it does not."""
        try:
            yield
        except BaseException:
            if self.found and self._lasting:
                say(f"{self.path}: keeps {len(self.found):,} answers; --resume goes on from them")
            raise
        if self._lasting:
            self.path.unlink(missing_ok=True)


def _line(text: str, outputs: Output) -> dict[str, Any]:
    return {"text": text, "outputs": outputs}
