"""Questions in JSONL and in the JSON of FiD and DPR."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoulders.errors import DataError
from shoulders.reader.passage import Passage
from shoulders.reader.questions import Question, read_questions, write_questions


def test_both_forms_are_read(tmp_path: Path) -> None:
    rows = [
        {"question": "who?", "answers": ["him", "her"], "gold_passage_id": 7},
        {"question": "what?", "ctxs": [{"id": 3, "title": "T", "text": "x", "score": "1.5"}]},
    ]
    lines, listed = tmp_path / "a.jsonl", tmp_path / "b.json"
    lines.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    listed.write_text("\n " + json.dumps(rows, indent=2), encoding="utf-8")
    expected = [
        Question("who?", ("him", "her"), "7"),
        Question("what?", (), None, (Passage("3", "T", "x"),), (1.5,)),
    ]
    assert read_questions(lines) == expected
    assert read_questions(listed) == expected


def test_what_is_written_is_read_again_and_has_their_fields(tmp_path: Path) -> None:
    question, found = Question("who?", ("É",)), Passage("d#1", "T", "text \u2028 é", "d.txt")
    write_questions(tmp_path / "c.json", [question], [[found]], [[0.25]])
    (entry,) = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert entry["ctxs"] == [{"id": "d#1", "title": "T", "text": "text \u2028 é", "score": 0.25}]
    (again,) = read_questions(tmp_path / "c.json")
    assert (again.question, again.answers, again.scores) == ("who?", ("É",), (0.25,))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"question": "a"}\n{"question": ', ":2: not valid JSON"),
        ('{"answers": ["a"]}', ":1: field 'question': Field required"),
        ('{"question": " "}', ":1: field 'question' is empty"),
        ('{"question": "a", "answers": "b"}', ":1: field 'answers'"),
        ('{"question": "a", "ctxs": [{"id": 1}]}', ":1: field 'ctxs.0.text'"),
        ('[{"question": "a"}, 3]', "entry 2: a question must be a JSON object, not a number"),
        ('[{"question": "a"},', ":1: not valid JSON"),
        ("", "holds no questions"),
        (
            '{"question": "a", "answer": ["b"]}',
            ":1: unknown field 'answer' (did you mean 'answers'?)",
        ),
        (
            '{"question": "a", "answer_list": ["b"]}',
            ":1: no field 'answers' (did you mean 'answer_list'?)",
        ),
        (
            '{"question": "a", "gold_pasage_id": "b"}',
            ":1: unknown field 'gold_pasage_id' (did you mean 'gold_passage_id'?)",
        ),
        ('[{"question": "a"},\n{"question": "b",]', ":2: not valid JSON"),
        ('{"question": "a", "answers": [" "]}', ":1: field 'answers' holds an empty text"),
        ('{"question": "a\\ud800"}', ":1: a question holds half a surrogate pair"),
        ('{"question": "a", "ctxs": [{"text": "b", "score": NaN}]}', ":1: not valid JSON: NaN"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_questions_are_named(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_questions(file)
    assert str(file) in str(raised.value)
    assert said in str(raised.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(DataError, match=r":1: not valid UTF-8 at byte 15"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b'{"question": "a"}\n' * 5000 + b'{"question": "\xff"}')
    with pytest.raises(DataError, match=r":5001: not valid UTF-8 at byte 15"):
        read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_bytes(b'[{"question": "a"},\n{"question": "\xff"}]')
    with pytest.raises(DataError, match=r"q.jsonl:2: not valid UTF-8 at byte 15"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_questions(tmp_path / "none.jsonl")
