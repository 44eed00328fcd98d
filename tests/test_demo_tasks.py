"""The demo's mixture: unseen test items, the same rows for a seed, and right answers."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("inflect")
pytest.importorskip("num2words")
pytest.importorskip("pycountry")
pytest.importorskip("babel")

from shoulders.data.rows import Row
from shoulders.demo import tasks as demo
from shoulders.errors import ShouldersError

Rows = tuple[list[Row], list[Row]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return demo.demo_rows(0)


@pytest.fixture(scope="module")
def other() -> Rows:
    return demo.demo_rows(1)


@pytest.fixture(scope="module")
def tasks() -> dict[str, demo.Task]:
    return {task.name: task for task in demo.demo_tasks()}


def test_every_task_has_the_same_number_of_rows(rows: Rows) -> None:
    train, test = (Counter(row.task for row in part) for part in rows)
    assert len(train) >= 10
    assert train.keys() == test.keys()
    assert set(train.values()) == {demo.TRAIN_ROWS}
    assert set(test.values()) == {demo.TEST_ROWS}


def test_no_row_comes_twice(rows: Rows) -> None:
    inputs = [row.input for part in rows for row in part]
    assert len(set(inputs)) == len(inputs)


def test_items_of_test_rows_are_unseen_by_every_task(
    rows: Rows, other: Rows, tasks: dict[str, demo.Task]
) -> None:
    # Read the items back out of the finished inputs, not out of the code that split them.
    pools = demo.demo_pools()
    asked = {
        (task.name, phrasing.format(x=shown)): (task.pool, item)
        for task in tasks.values()
        for item, shown in ((item, task.show(item)) for item in pools[task.pool])
        for phrasing in task.phrasings
    }
    for split in (rows, other):
        train, test = ({asked[row.task, row.input] for row in part} for part in split)
        assert train
        assert test
        assert not train & test


def test_a_seed_fixes_the_rows(rows: Rows, other: Rows) -> None:
    assert demo.demo_rows(0) == rows
    assert other != rows


def test_inputs_and_targets_are_short_and_not_empty(rows: Rows) -> None:
    for row in (*rows[0], *rows[1]):
        assert row.targets
        assert all(target and target == target.strip() for target in row.targets)
        assert len(row.targets[0].split()) <= 4
        assert 3 <= len(row.input.split()) <= 10


@pytest.mark.parametrize("task", ["article", "category", "month"])
def test_classes_come_equally_often(task: str, rows: Rows) -> None:
    for part in rows:
        found = Counter(row.targets[0].split()[0] for row in part if row.task == task)
        assert max(found.values()) - min(found.values()) <= 1


@pytest.mark.parametrize(
    ("task", "item", "answers"),
    [
        ("plural", "goose", ("geese",)),
        ("article", "umpire", ("an umpire",)),
        ("article", "university", ("a university",)),
        ("category", "hammer", ("tool",)),
        ("uppercase", "zebra", ("ZEBRA",)),
        ("first_letter", "zebra", ("Z",)),
        ("participle", "swim", ("swimming",)),
        ("participle", "bake", ("baking",)),
        ("number_words", "21", ("twenty-one",)),
        ("number_digits", "21", ("21",)),
        ("ordinal", "112", ("112th",)),
        ("ordinal", "21", ("21st",)),
        ("country_code", "France", ("FR",)),
        ("country_code", "Switzerland", ("CH",)),
        ("country_language", "Brazil", ("Portuguese",)),
        ("country_language", "Canada", ("English", "French")),
        ("month", "1987-07", ("July",)),
    ],
)
def test_known_facts(
    task: str, item: str, answers: tuple[str, ...], tasks: dict[str, demo.Task]
) -> None:
    assert tasks[task].answer(item) == answers


def test_number_digits_asks_in_words(tasks: dict[str, demo.Task]) -> None:
    assert tasks["number_digits"].show("21") == "twenty-one"


def test_a_missing_package_is_named_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycountry", None)
    with pytest.raises(ShouldersError, match=r"pycountry: pip install -e '\.\[demo\]'"):
        demo.demo_rows(0)


def test_importing_the_module_imports_no_package_of_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("inflect", "num2words", "pycountry", "babel"):
        monkeypatch.setitem(sys.modules, name, None)  # any import of it now raises
    source = Path(demo.__file__).read_text(encoding="utf-8")
    module = ModuleType("fresh_copy_of_tasks")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    exec(compile(source, demo.__file__, "exec"), module.__dict__)
    assert module.TRAIN_ROWS == demo.TRAIN_ROWS
