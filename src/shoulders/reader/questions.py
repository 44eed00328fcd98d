"""Questions with answers, and the JSON in which FiD and DPR exchange them with their passages.

Read are JSONL (one object a line) and a JSON list of `{"question", "answers"}`, with an optional
`gold_passage_id` and the `ctxs` of any retriever: `[{"id", "title", "text", "score"}]`, best first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from shoulders.errors import DataError, nearest
from shoulders.files import atomic_path
from shoulders.lines import (
    MARK,
    check_encodable,
    decoded,
    json_lines,
    json_object,
    parsed,
    refuse_slips,
)
from shoulders.reader.passage import Passage

WHAT = "a question"


@dataclass(frozen=True, slots=True)
class Question:
    """A question, every right answer, and what is known of where the answer stands.

    Attributes:
        question: as a person asks it.
        answers: any one is right; empty where they are not known.
        gold_passage_id: a passage that holds the answer.
        contexts: passages that some retriever found, best first; None without any.
        scores: their scores, as many.
        where: the file and line it stands in, for messages; no part of what it is.
    """

    question: str
    answers: tuple[str, ...]
    gold_passage_id: str | None = None
    contexts: tuple[Passage, ...] | None = None
    scores: tuple[float, ...] = ()
    where: str | None = field(default=None, compare=False, repr=False)

    @property
    def named(self) -> str:
        """What messages call it: where it stands, and how it begins."""
        begins = f"question '{self.question[:60]}'"
        return begins if self.where is None else f"{self.where}: {begins}"


class _Context(BaseModel):
    """One of `ctxs`; other fields (`has_answer`, ...) are left alone."""

    model_config = ConfigDict(coerce_numbers_to_str=True)

    id: str | None = None
    title: str | None = None
    text: str
    score: FiniteFloat = 0.0


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


def check_answered(questions: Sequence[Question]) -> None:
    """Raise `DataError` for a question without answers: nothing can be compared with it."""
    for question in questions:
        if not question.answers:
            raise DataError(f"{question.named} has no answers; give it some or remove it")


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


def _objects(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every object of the file and where it stands."""
    try:
        with path.open("rb") as file:
            begins = file.read(4096).removeprefix(MARK).lstrip()
        whole = path.read_bytes().removeprefix(MARK) if begins.startswith(b"[") else None
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error
    if whole is None:
        yield from json_lines(path, WHAT)
        return
    for number, value in enumerate(parsed(decoded(whole, path), path), start=1):
        where = f"{path}, entry {number}"
        yield json_object(value, where, WHAT), where


def _question(values: dict[str, Any], where: str) -> Question:
    refuse_slips(values, _Row.model_fields.keys() - values.keys(), where)
    check_encodable(json.dumps(values, ensure_ascii=False), f"{where}: {WHAT}")
    try:
        row = _Row.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: field '{field}': {first['msg']}") from error
    if not row.question.strip():
        raise DataError(f"{where}: field 'question' is empty")
    if "answers" not in values and (meant := nearest("answers", [*values])):
        raise DataError(f"{where}: no field 'answers'{meant}")
    if any(not answer.strip() for answer in row.answers):
        raise DataError(f"{where}: field 'answers' holds an empty text; leave it out")
    contexts = None
    if row.ctxs is not None:
        contexts = tuple(Passage(c.id or "", c.title or "", c.text) for c in row.ctxs)
    return Question(
        row.question,
        tuple(row.answers),
        row.gold_passage_id,
        contexts,
        tuple(c.score for c in row.ctxs or ()),
        where,
    )
