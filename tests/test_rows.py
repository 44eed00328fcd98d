"""Rows: what is read, and that every malformed row is named by file and line."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoulders.data.rows import Row, read_rows
from shoulders.errors import DataError

DATA = Path(__file__).parents[2] / "shared" / "data"
GOOD = {"task": "sum", "input": "1 2", "targets": ["3"]}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_every_field_in_file_order(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl",
        {"task": "b", "input": " 1 ", "targets": ["3", "three"], "options": ["3", "4"]},
        {"task": "a", "input": "2", "target": "4"},
    )
    assert read_rows(file) == [
        Row("b", " 1 ", ("3", "three"), ("3", "4")),
        Row("a", "2", ("4",), None),
    ]


def test_task_defaults_to_the_argument_then_the_stem_but_a_row_may_name_its_own(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "rhymes.jsonl", {"input": "x", "target": "y"}, GOOD)
    assert [row.task for row in read_rows(file)] == ["rhymes", "sum"]
    assert [row.task for row in read_rows(file, task="given")] == ["given", "sum"]


def test_bom_crlf_blank_lines_and_line_separators_inside_texts_are_accepted(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.jsonl"
    line = '{"task": "t", "input": "a\u2028b\u0085c", "target": "ä"}'
    file.write_bytes(b"\xef\xbb\xbf" + f"{line}\r\n\r\n{line}".encode())
    assert read_rows(file) == [Row("t", "a\u2028b\u0085c", ("ä",))] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "x", "tagrets": ["y"]}, "unknown field 'tagrets' (did you mean 'targets'?)"),
        ({**GOOD, "Input": "x"}, "unknown field 'Input' (did you mean 'input'?)"),
        ({**GOOD, "taks": "x"}, "unknown field 'taks' (did you mean 'task'?)"),
        ({**GOOD, "tsk": "x"}, "unknown field 'tsk' (did you mean 'task'?)"),
        ({**GOOD, "inpit": "x"}, "unknown field 'inpit' (did you mean 'input'?)"),
        ({**GOOD, "option": ["3"]}, "unknown field 'option' (did you mean 'options'?)"),
        ({**GOOD, "targts": ["3"]}, "unknown field 'targts' (did you mean 'targets'?)"),
        ({**GOOD, "Targets": ["3"]}, "unknown field 'Targets' (did you mean 'targets'?)"),
        ({**GOOD, "tasks": "x"}, "unknown field 'tasks' (did you mean 'task'?)"),
        ({**GOOD, "inputs": "x"}, "unknown field 'inputs' (did you mean 'input'?)"),
        ({"targets": ["y"]}, "no field 'input'"),
        ({"input": "x"}, "no field 'targets'"),
        ({"input": "x", "targets": None}, "no field 'targets'"),
        ({**GOOD, "target": "3"}, "both 'target' and 'targets'"),
        ({"question": "q", "answers": ["a"], "targets": ["b"]}, "both 'answers' and 'targets'"),
        ({**GOOD, "targets": []}, "'targets' is an empty list"),
        ({**GOOD, "targets": "3"}, "must be a list of texts, not a text; use 'target'"),
        ({**GOOD, "targets": ["3", ""]}, "'targets[1]' is empty"),
        ({**GOOD, "targets": ["3", " \n"]}, "'targets[1]' is empty"),
        ({**GOOD, "targets": [3]}, "'targets[0]' must be a text, not a number; write it in quotes"),
        ({**GOOD, "targets": [True]}, "'targets[0]' must be a text, not true or false"),
        ({**GOOD, "targets": [None]}, "'targets[0]' must be a text, not null"),
        ({"input": "x", "target": 1.0}, 'must be a text, not a number; write it in quotes: "1.0"'),
        ({**GOOD, "input": ""}, "'input' is empty"),
        ({**GOOD, "input": ["x"]}, "'input' must be a text, not a list"),
        ({**GOOD, "input": {"a": 1}}, "'input' must be a text, not an object"),
        ({**GOOD, "input": "\ud800"}, "'input' holds half a surrogate pair"),
        ({**GOOD, "task": 7}, "'task' must be a text, not a number"),
        ({**GOOD, "task": ""}, "'task' is empty"),
        ({**GOOD, "options": []}, "'options' is an empty list"),
        ({**GOOD, "options": ["4", "5"]}, "none of 'targets' is among 'options'"),
        ([GOOD], "a row must be a JSON object, not a list"),
        (3, "a row must be a JSON object, not a number"),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named_by_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path / "x.jsonl", GOOD, row, GOOD)
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["id", "metadata", "question_id", "task_id", "target_id", "index", "label", "dataset",
     "tags", "optional", "t", ""],
)  # fmt: skip
def test_extra_fields_that_resemble_no_known_one_are_ignored(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "x.jsonl", {**GOOD, name: {"any": [1]}})
    assert read_rows(file) == [Row("sum", "1 2", ("3",))]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"task": "t",', "not valid JSON: "),
        (b'{"task": "t"} {"task": "u"}', "not valid JSON: Extra data at column 15"),
        (b"{'task': 't'}", "not valid JSON: "),
        (b"[" * 100_000, "not valid JSON: "),
        (b'{"input": "x", "targets": ["y"], "score": NaN}', "not valid JSON: NaN is no JSON"),
        (b'{"input": "x", "targets": ["y"], "input": "z"}', "'input' stands there twice"),
        (b'{"input": "caf\xe9"}', "not valid UTF-8 at byte 15"),
        ('{"input": "x"}'.encode("utf-16"), "not valid UTF-8 at byte 1"),
    ],
)
def test_a_line_that_is_no_json_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(DataError, match=r"x\.jsonl:2: ") as caught:
        read_rows(file)
    assert message in str(caught.value)


def test_missing_empty_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        read_rows(tmp_path / "no.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        read_rows(tmp_path / "empty.jsonl")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match=r"cannot read '\.csv' files; use \.jsonl or \.parquet"):
        read_rows(tmp_path / "x.csv")


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(texts, texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5
    ),
    ascii_=st.booleans(),
)
def test_any_text_survives_unchanged(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], ascii_: bool
) -> None:
    file = tmp_path_factory.mktemp("rows") / "x.jsonl"
    values = [{"task": t, "input": i, "targets": ts} for t, i, ts in rows]
    lines = "\n".join(json.dumps(value, ensure_ascii=ascii_) for value in values)
    file.write_bytes(lines.encode())
    assert read_rows(file) == [Row(t, i, tuple(ts)) for t, i, ts in rows]


# Tables ---------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def p3(*inputs: str, **more: list[Any]) -> dict[str, list[Any]]:
    return {
        "inputs": [[1, 2]] * len(inputs),  # token ids: must not be taken for the text
        "inputs_pretokenized": list(inputs),
        "targets": [[3]] * len(inputs),
        "targets_pretokenized": [f"\n{text.strip()}! " for text in inputs],
        **more,
    }


def test_p3_columns_are_read_stripped_with_their_choices(tmp_path: Path) -> None:
    columns = p3("a ", " b", answer_choices=[["a!", " x "], []])
    file = write_parquet(tmp_path / "anli.parquet", columns)
    assert read_rows(file) == [
        Row("anli", "a", ("a!",), ("a!", "x")),
        Row("anli", "b", ("b!",), None),
    ]
    assert read_rows(file, task="nli")[0].task == "nli"


def test_wrong_choices_of_p3_score_tables_are_not_rows(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", p3("a", "b", "c", is_correct=[True, False, None]))
    assert [row.input for row in read_rows(file)] == ["a", "c"]


def test_a_folder_of_parquet_files_is_read_in_order_under_its_own_name(tmp_path: Path) -> None:
    for shard, text in enumerate("ab"):
        write_parquet(tmp_path / "anli" / f"train-{shard:05}-of-00002.parquet", p3(text))
    assert read_rows(tmp_path / "anli") == [Row("anli", "a", ("a!",)), Row("anli", "b", ("b!",))]
    # Words that only hold a split's name tell nothing.
    for name in ("latest", "trained"):
        write_parquet(tmp_path / "others" / f"{name}.parquet", p3("a"))
    assert len(read_rows(tmp_path / "others")) == 2


@pytest.mark.parametrize(
    "name", ["{}-00000-of-00001", "squad-{}", "squad_{}_1", "squad.{}", "latest-contest-{}"]
)
def test_a_folder_that_holds_a_test_split_too_is_refused(name: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_parquet(tmp_path / f"{name.format(split)}.parquet", p3("a"))
    with pytest.raises(DataError, match=r"several splits \(test, train\)"):
        read_rows(tmp_path)


def test_own_columns_in_parquet_are_checked_like_jsonl(tmp_path: Path) -> None:
    good = {"task": ["t", None], "input": ["x", " y"], "targets": [["1"], ["2", "3"]], "id": [1, 2]}
    file = write_parquet(tmp_path / "x.parquet", good)
    assert read_rows(file) == [Row("t", "x", ("1",)), Row("x", " y", ("2", "3"))]
    file = write_parquet(tmp_path / "y.parquet", {"input": ["x", "y"], "target": ["1", ""]})
    with pytest.raises(DataError, match=r"y\.parquet: row 2: 'target' is empty"):
        read_rows(file)
    file = write_parquet(tmp_path / "z.parquet", {"input": ["x"], "target": [1]})
    with pytest.raises(DataError, match=r"row 1: 'target' must be a text, not a number"):
        read_rows(file)
    file = write_parquet(tmp_path / "w.parquet", {"input": ["x"], "target": ["1"], "taks": ["a"]})
    with pytest.raises(DataError, match=r"unknown field 'taks' \(did you mean 'task'\?\)"):
        read_rows(file)


def test_unknown_columns_empty_inputs_and_damaged_tables_are_named(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", {"question": ["x"], "answer": ["y"]})
    with pytest.raises(DataError, match=r"needs the columns .*; found question, answer"):
        read_rows(file)
    file = write_parquet(tmp_path / "y.parquet", p3("a", " "))
    with pytest.raises(DataError, match=r"row 2: 'inputs_pretokenized' is empty"):
        read_rows(file)
    (tmp_path / "z.parquet").write_bytes(b"PAR1 nothing of the kind")
    with pytest.raises(DataError, match=r"z\.parquet: cannot read this table: ") as caught:
        read_rows(tmp_path / "z.parquet")
    assert "\n" not in str(caught.value)


def save_to_disk(folder: Path, *shards: dict[str, list[Any]]) -> Path:
    """Write what `datasets.Dataset.save_to_disk` writes, plus the cache it may leave behind."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(shards):05}.arrow" for i in range(len(shards))]
    for name, columns in zip([*names, "cache-1.arrow"], [*shards, p3("cached")], strict=True):
        table = pa.table(columns)
        with pa.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def test_a_saved_dataset_is_read_without_its_caches(tmp_path: Path) -> None:
    folder = save_to_disk(tmp_path / "anli", p3("a", "b"), p3("c"))
    assert [(row.task, row.input) for row in read_rows(folder)] == [
        ("anli", "a"),
        ("anli", "b"),
        ("anli", "c"),
    ]


def test_a_saved_dict_of_splits_asks_which_one(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "anli" / "train", p3("a"))
    save_to_disk(tmp_path / "anli" / "test", p3("b"))
    with pytest.raises(DataError, match="holds several splits; name one of them: test, train"):
        read_rows(tmp_path / "anli")


def test_without_pyarrow_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_parquet(tmp_path / "x.parquet", p3("a"))
    real = builtins.__import__

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", fake)
    with pytest.raises(DataError, match=r"pip install -e '\.\[data\]'"):
        read_rows(file)


def test_the_multitask_validation_split_is_read_whole() -> None:
    file = DATA / "multitask" / "validation.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not on this machine")
    rows = read_rows(file)
    assert len(rows) == 1268
    assert len({row.task for row in rows}) == 24


def test_open_questions_are_rows(tmp_path: Path) -> None:
    file = tmp_path / "nq.jsonl"
    file.write_text('{"question": "who?", "answers": ["a", "b"], "gold_passage_id": "1"}\n')
    assert read_rows(file) == [Row("nq", "who?", ("a", "b"))]
    file.write_text('{"question": "who?"}\n')
    with pytest.raises(DataError, match="no field 'input'"):
        read_rows(file)
