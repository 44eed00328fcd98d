"""Templates: rendering, fallback, sandbox, and messages that name file, task and template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoulders.data.rows import Row, read_rows
from shoulders.data.templates import Templates
from shoulders.errors import DataError

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared" / "data"
ROW = Row("antonyms", "hot", ("cold",))


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "t.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_row_that_cannot_be_rendered_is_named() -> None:
    row = Row("b", "x", ("y",), where="rows.jsonl:2")
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: .*no templates for task 'b'"):
        Templates({"a": ["{{ input }}"]}).render(row)
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: .*'options' is undefined"):
        Templates({"b": ["{{ input }} {{ options }}"]}).render(row)


def test_every_template_of_the_task_is_rendered_in_order() -> None:
    templates = Templates({"antonyms": ["Opposite of {{ input }}?", "{{ task }}: {{ input }}"]})
    assert templates.texts(ROW) == ["Opposite of hot?", "antonyms: hot"]
    assert templates.count("antonyms") == 2


def test_which_template_counts_modulo() -> None:
    templates = Templates({"*": ["a {{ input }}", "b {{ input }}", "c {{ input }}"]})
    assert [templates.render(ROW, which) for which in (0, 1, 2, 3, 7)] == [
        "a hot",
        "b hot",
        "c hot",
        "a hot",
        "b hot",
    ]
    assert templates.render(ROW) == "a hot"


def test_the_default_is_the_input_alone_for_any_task() -> None:
    assert Templates().texts(ROW) == ["hot"]
    assert Templates().as_dict() == {"*": ["{{ input }}"]}
    assert Templates().named_tasks() == []


def test_a_named_task_does_not_use_the_fallback() -> None:
    templates = Templates({"antonyms": ["own {{ input }}"], "*": ["any {{ input }}"]})
    assert templates.texts(ROW) == ["own hot"]
    assert templates.texts(Row("sum", "1 2", ("3",))) == ["any 1 2"]
    assert templates.named_tasks() == ["antonyms"]


def test_a_task_without_templates_or_fallback_is_named() -> None:
    templates = Templates({"antonyms": ["{{ input }}"]}, source="t.yaml")
    for use in (templates.texts, templates.render, lambda row: templates.count(row.task)):
        with pytest.raises(
            DataError, match=r"^t\.yaml: no templates for task 'antonym' "
        ) as caught:
            use(Row("antonym", "x", ("y",)))
        assert "(did you mean 'antonyms'?)" in str(caught.value)


def test_options_are_texts_and_undefined_where_a_row_has_none() -> None:
    templates = Templates({"*": ["{{ input }} ({{ options | join(' or ') }})"]})
    assert templates.texts(Row("t", "x", ("a",), ("a", "b"))) == ["x (a or b)"]
    with pytest.raises(DataError, match=r"task '\*', template 1: .*'options' is undefined"):
        templates.texts(ROW)
    text = "{{ input }}{% if options is defined %} of {{ options | length }}{% endif %}"
    optional = Templates({"*": [text]})
    assert optional.texts(ROW) == ["hot"]
    assert optional.texts(Row("t", "x", ("a",), ("a", "b"))) == ["x of 2"]


@given(st.text(min_size=1).filter(str.strip))
def test_an_input_is_never_escaped_nor_read_as_a_template(text: str) -> None:
    templates = Templates({"*": ["[{{ input }}]"]})
    for content in (text, "{{ task }}" + text, "{% raw %}" + text, "<b>&" + text):
        assert templates.texts(Row("t", content, ("y",))) == [f"[{content}]"]


def test_reading_yaml(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        '\ufeffantonyms:\n  - "Opposite of {{ input }}?"\n  - |\n    {{ input }}\n    Opposite?\n'
        '"*": ["{{ input }}"]\n',
    )
    templates = Templates.read(file)
    assert templates.texts(ROW) == ["Opposite of hot?", "hot\nOpposite?"]


def test_round_trip_through_json() -> None:
    templates = Templates({"a": ["ä {{ input }}\n", "{{ input }}"], "*": ["{{ input }}"]})
    stored = json.loads(json.dumps(templates.as_dict()))
    assert Templates.from_dict(stored).as_dict() == templates.as_dict() == stored
    assert Templates.from_dict(stored).texts(Row("a", "x", ("y",))) == ["ä x", "x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: ['{{ input }}']\nb: [x]\na: [y]\n", "t.yaml:3: not valid YAML: 'a' is given twice"),
        ("a:\n  - {{ input }}\n", "put templates that begin with {{ in quotes"),
        ("a: [\n", "t.yaml:2: not valid YAML: "),
        ("!!python/object/apply:os.getcwd []\n", "t.yaml:1: not valid YAML: "),
        ("", "must map task names to lists of templates"),
        ("- '{{ input }}'\n", "must map task names to lists of templates"),
        ("{}\n", "no templates"),
        ("a: '{{ input }}'\n", "task 'a' needs a list of templates"),
        ("a: []\n", "task 'a' needs a list of templates"),
        ("a: ['{{ input }}', 3]\n", "task 'a', template 2: must be a text, not 3"),
        ("1: ['{{ input }}']\n", "task name 1 is no text; put it in quotes"),
        ("a: ['{{ input }}', '{{ input']\n", "task 'a', template 2: not a valid template: "),
        ("a: ['{% if %}{{ input }}']\n", "task 'a', template 1: not a valid template: "),
        ("a: ['{{ input | nofilter }}']\n", "task 'a', template 1: not a valid template: "),
        ("a: ['{{ inputs }}']\n", "unknown variable 'inputs' (did you mean 'input'?)"),
        ("a: ['{{ input }} {{ q }}']\n", "unknown variable 'q'; use input, task, options"),
        ("a: ['What is it?']\n", "task 'a', template 1: leaves out the input; add {{ input }}"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        Templates.read(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_bad_utf8(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.yaml: cannot read: No such file"):
        Templates.read(tmp_path / "no.yaml")
    (tmp_path / "x.yaml").write_bytes(b"a: [caf\xe9]")
    with pytest.raises(DataError, match=r"x\.yaml: not valid UTF-8 at byte 8"):
        Templates.read(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if input == 'x' %}{{ input }}{% endif %}", "renders to nothing for input 'hot'"),
        ("{{ input.nothing }}", "cannot be rendered for task 'antonyms'"),
        ("{{ input + 1 }}", "cannot be rendered for task 'antonyms'"),
        ("{{ input.__class__.__mro__ }}", "cannot be rendered for task 'antonyms'"),
        ("{{ input }}{{ range(999999999) | length }}", "cannot be rendered"),
    ],
)
def test_a_template_that_fails_on_a_row_is_named(template: str, message: str) -> None:
    templates = Templates({"*": ["{{ input }}", template]}, source="t.yaml")
    assert templates.render(ROW, 0) == "hot"
    with pytest.raises(DataError, match=r"^t\.yaml: task '\*', template 2: ") as caught:
        templates.render(ROW, 1)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def multitask() -> Templates:
    return Templates.read(ROOT / "recipes" / "templates" / "multitask.yaml")


def test_multitask_templates_are_three_short_distinct_ones_per_task(multitask: Templates) -> None:
    stored = multitask.as_dict()
    assert len(stored) == 24
    texts = [text for task in stored for text in stored[task]]
    assert len(set(texts)) == len(texts) == 72
    for task, own in stored.items():
        limit = 25 if task == "sentence_similarity" else 14
        for text in own:
            words = text.replace("{{ input }}", " ").replace("-", " ").split()
            assert 2 <= len(words) <= limit, text
            assert not text.endswith("Answer:")


def test_multitask_templates_name_the_labels_the_data_has(multitask: Templates) -> None:
    file = DATA / "multitask" / "train.jsonl"
    if not file.exists():
        pytest.skip(f"{file} is not on this machine")
    labels: dict[str, set[str]] = {}
    example: dict[str, Any] = {}
    for row in read_rows(file):
        labels.setdefault(row.task, set()).update(row.targets)
        example[row.task] = row
    assert set(multitask.named_tasks()) == set(labels)
    for task in ("sentiment", "word_in_context", "sentence_similarity"):
        assert 2 <= len(labels[task]) <= 6
        for text in multitask.as_dict()[task]:
            assert all(label in text for label in labels[task]), (task, text)
    for task, row in example.items():
        assert all(row.input.strip() in text for text in multitask.texts(row)), task
