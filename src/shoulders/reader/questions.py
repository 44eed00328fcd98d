"""Questions with answers, and the JSON in which FiD and DPR exchange them with their passages.

Read are JSONL (one object a line) and a JSON list of `{"question", "answers"}`, with an optional
`gold_passage_id` and the `ctxs` of any retriever: `[{"id", "title", "text", "score"}]`, best first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from shoulders.errors import DataError, nearest
from shoulders.files import atomic_path
from shoulders.reader.passage import Passage

_MARK = b"\xef\xbb\xbf"  # ahead of what some editors save as UTF-8


@dataclass(frozen=True, slots=True)
class Question:
    """A question, every right answer, and what is known of where the answer stands.

    Attributes:
        question: as a person asks it.
        answers: any one is right; empty where they are not known.
        gold_passage_id: a passage that holds the answer.
        contexts: passages that some retriever found, best first; None without any.
        scores: their scores, as many.
    """

    question: str
    answers: tuple[str, ...]
    gold_passage_id: str | None = None
    contexts: tuple[Passage, ...] | None = None
    scores: tuple[float, ...] = ()


class _Context(BaseModel):
    """One of `ctxs`; other fields (`has_answer`, ...) are left alone."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str = ""
    title: str = ""
    text: str
    score: float = 0.0


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    question: str
    answers: list[str] = []
    gold_passage_id: str | None = None
    ctxs: list[_Context] | None = None


def read_questions(path: Path) -> list[Question]:
    """Read questions; raises `DataError` that names the file, the line (or entry) and the field."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = [_question(values, where) for values, where in _objects(path)]
    if not found:
        raise DataError(f"{path}: holds no questions")
    return found


def write_questions(
    path: Path,
    questions: Sequence[Question],
    contexts: Sequence[Sequence[Passage]],
    scores: Sequence[Sequence[float]],
) -> None:
    """Write what FiD and DPR's scripts read: a JSON list with `ctxs`, best first; atomically.

    `scores` are the retriever's: what is read again is re-ranked with them.
    """
    entries = [
        {
            "question": question.question,
            "answers": list(question.answers),
            "ctxs": [
                {"id": p.id, "title": p.title, "text": p.text, "score": score}
                for p, score in zip(passages, own, strict=True)
            ],
        }
        for question, passages, own in zip(questions, contexts, scores, strict=True)
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")


def _objects(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield every object of the file and where it stands."""
    with path.open("rb") as file:
        head = file.read(4096).removeprefix(_MARK).lstrip()
        file.seek(0)
        if head.startswith(b"["):
            whole = file.read().removeprefix(_MARK)
            for number, values in enumerate(_parsed(whole, f"{path}", whole=True), 1):
                yield values, f"{path}, entry {number}"
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _parsed(line.removeprefix(_MARK) if number == 1 else line, where), where


def _parsed(raw: bytes, where: str, *, whole: bool = False) -> Any:
    try:
        text = raw.decode("utf-8")
        value = json.loads(text, parse_constant=_refused)
        # Half a surrogate pair, which JSON can name and nothing can write.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        place = f"{where}, line {line}" if whole else where
        raise DataError(f"{place}: not UTF-8: byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a surrogate pair (\\ud800-\\udfff)") from error
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if whole else where
        raise DataError(f"{place}: not valid JSON: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _question(values: Any, where: str) -> Question:
    try:
        row = _Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = f"field '{field}': {first['msg']}" if field else "not an object with a question"
        raise DataError(f"{where}: {problem}") from error
    if not row.question.strip():
        raise DataError(f"{where}: field 'question' is empty")
    if "answers" not in values and (meant := nearest("answers", [*values])):
        raise DataError(f"{where}: no field 'answers'{meant}")
    if any(not answer.strip() for answer in row.answers):
        raise DataError(f"{where}: field 'answers' holds an empty text; leave it out")
    contexts = None
    if row.ctxs is not None:
        contexts = tuple(Passage(c.id, c.title, c.text) for c in row.ctxs)
    return Question(
        row.question,
        tuple(row.answers),
        row.gold_passage_id,
        contexts,
        tuple(c.score for c in row.ctxs or ()),
    )
