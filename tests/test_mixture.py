"""Mixtures: rates, and an order that is a pure function of (seed, position)."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shoulders.data.mixture import (
    BLOCK,
    Mixture,
    MixtureConfig,
    draws_before,
    mixing_rates,
    select_rows,
)
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import DataError, RecipeError

TEMPLATES = Templates({"*": ["A {{ input }}", "B {{ input }}", "C {{ input }}"]})


def make_rows(sizes: dict[str, int]) -> list[Row]:
    return [Row(task, f"{task}{i}", (str(i),)) for task, n in sizes.items() for i in range(n)]


def make(sizes: dict[str, int], seed: int = 0, **settings_: object) -> Mixture:
    config = MixtureConfig(train=["x"], **settings_)  # type: ignore[arg-type]
    return Mixture(make_rows(sizes), TEMPLATES, config, seed)


SIZES = {"big": 700, "mid": 60, "small": 7, "one": 1}


# Rates ----------------------------------------------------------------------------------------


def test_rates_are_proportional_capped_and_tempered() -> None:
    assert mixing_rates({"a": 300, "b": 100}) == {"a": 0.75, "b": 0.25}
    assert mixing_rates({"a": 900, "b": 100}, cap=300) == {"a": 0.75, "b": 0.25}
    assert mixing_rates({"a": 900, "b": 100}, temperature=2) == pytest.approx(
        {"a": 0.75, "b": 0.25}
    )
    # The cap comes before the temperature, as in T5.
    assert mixing_rates({"a": 5000, "b": 100}, cap=900, temperature=2)["a"] == pytest.approx(0.75)


@settings(max_examples=50)
@given(
    st.dictionaries(st.text(max_size=4), st.integers(1, 10**6), min_size=1, max_size=8),
    st.none() | st.integers(1, 10**5),
    st.floats(1, 50),
)
def test_rates_sum_to_one_and_keep_the_order_of_sizes(
    counts: dict[str, int], cap: int | None, temperature: float
) -> None:
    rates = mixing_rates(counts, cap, temperature)
    assert sum(rates.values()) == pytest.approx(1)
    ordered = sorted(counts, key=lambda task: counts[task])
    for smaller, larger in itertools.pairwise(ordered):
        assert rates[smaller] <= rates[larger] * (1 + 1e-12)


def test_rates_refuse_what_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="no tasks"):
        mixing_rates({})
    with pytest.raises(DataError, match="task 'b' has no rows"):
        mixing_rates({"a": 1, "b": 0})
    with pytest.raises(RecipeError, match="cap is 0"):
        mixing_rates({"a": 1}, cap=0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="temperature is"):
            mixing_rates({"a": 1}, temperature=bad)
    with pytest.raises(RecipeError, match="'a' would never be drawn; raise temperature"):
        mixing_rates({"a": 1, "b": 10**6}, temperature=0.01)


# Order ----------------------------------------------------------------------------------------


def test_any_position_is_recomputed_without_state() -> None:
    walked = make(SIZES).window(0, 3 * BLOCK)
    used, order = make(SIZES), np.random.default_rng(0).permutation(3 * BLOCK)
    for i in order:  # jumping about, with NumPy integers
        assert used.example(i) == walked[i]
    for i in (0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 17):
        assert make(SIZES).example(i) == walked[i]


def test_the_order_is_pinned() -> None:
    """The order is the same in every process; changing it breaks resuming unfinished runs."""
    mixture = make(SIZES, seed=1)
    assert [mixture.example(i)[1] for i in (0, 1, 2, 255, 256, 10_000, 10**9)] == PINNED


def test_seeds_and_rows_change_the_order() -> None:
    first = make(SIZES, 0).window(0, 100)
    assert first != make(SIZES, 1).window(0, 100)
    # Not merely the same rows elsewhere: the visiting order within one task differs too.
    inside = [[row.input for row, _ in make({"a": 50}, s).window(0, 50)] for s in (0, 1)]
    assert inside[0] != inside[1]
    assert inside[0] != sorted(inside[0])


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.integers(0, 2**40),
    st.none() | st.integers(1, 100),
)
def test_every_row_is_seen_once_before_any_is_seen_again(
    sizes: list[int], seed: int, cap: int | None
) -> None:
    named = {f"t{i}-": size for i, size in enumerate(sizes)}
    seen: dict[str, list[str]] = {task: [] for task in named}
    # Whole blocks: within one, a task's draws are in order, so any prefix would do as well.
    for row, _ in make(named, seed, cap=cap).window(0, 2 * BLOCK + 50):
        seen[row.task].append(row.input)
    for task, size in named.items():
        for start in range(0, len(seen[task]), size):
            epoch = seen[task][start : start + size]
            assert len(set(epoch)) == len(epoch)


def test_few_examples_come_again_in_another_order_under_the_next_template() -> None:
    n = 90
    endless, few = make(SIZES), make(SIZES, examples=n)
    assert few.window(0, n) == endless.window(0, n)

    def rows(passage: int) -> list[str]:
        return [row.input for row, _ in few.window(passage * n, n)]

    first, second, third = rows(0), rows(1), rows(2)
    assert Counter(first) == Counter(second) == Counter(third)
    assert first != second != third != first
    assert [few.example(i) for i in range(2 * n)] == few.window(0, 2 * n)  # whatever came before

    # "A x" and "B x": an example of one row has the next template when it comes again.
    once = {text for _, text in few.window(0, n)}
    again = {text for _, text in few.window(n, n)}
    following = {"A": "B", "B": "C", "C": "A"}
    assert again == {following[text[0]] + text[1:] for text in once}


@given(st.integers(0, 10**9), st.integers(1, 500))
def test_with_few_examples_no_other_row_is_ever_read(position: int, n: int) -> None:
    few = make({"big": 40, "small": 3}, examples=n)
    assert few.example(position)[0] in [row for row, _ in few.window(0, n)]


def test_a_new_epoch_has_a_new_permutation() -> None:
    inputs = [row.input for row, _ in make({"a": 40}).window(0, 80)]
    assert sorted(inputs[:40]) == sorted(inputs[40:])
    assert inputs[:40] != inputs[40:]


def test_a_row_meets_every_template_once_in_as_many_epochs() -> None:
    mixture = make({"a": 30})
    first = [text[0] for _, text in mixture.window(0, 30)]
    assert set(first) == {"A", "B", "C"}  # rows of one epoch do not share one template
    met: dict[str, list[str]] = {}
    for row, text in mixture.window(0, 90):
        met.setdefault(row.input, []).append(text[0])
    assert all(sorted(letters) == ["A", "B", "C"] for letters in met.values())


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 100_000), min_size=1, max_size=40),
    st.integers(0, 10**6),
    st.integers(0, 10**7),
)
def test_counts_are_exact_monotone_and_close_to_the_rates(
    sizes: list[int], seed: int, n: int
) -> None:
    rates = mixing_rates({str(i): size for i, size in enumerate(sizes)})
    rate = np.array(list(rates.values()))
    phase = np.random.default_rng(seed).random(len(sizes))
    counts = draws_before(n, rate, phase)
    assert counts.sum() == n
    assert (counts >= 0).all()
    following = draws_before(n + 1, rate, phase) - counts
    assert following.min() >= 0
    assert following.sum() == 1
    assert (np.abs(counts - n * rate) <= 1 + len(sizes) * rate).all()


@pytest.mark.parametrize("phase_of_rare", [0.0, 0.5, 1 - 2**-53])
def test_counts_equal_those_of_a_scan_even_for_the_worst_phases(phase_of_rare: float) -> None:
    # 100 rare tasks that are all due first (or last) push the big one far from n * rate.
    rate = np.array([0.5, *[0.005] * 100])
    phase = np.array([0.3, *[phase_of_rare] * 100])
    due = sorted(((k + phase[t]) / rate[t], t) for t in range(101) for k in range(1000))
    order = [t for _, t in due]
    for n in (0, 1, 99, 150, 199, 200, 201, 300, 777, 1000):
        expected = np.bincount(np.array(order[:n], dtype=int), minlength=101)
        assert (draws_before(n, rate, phase) == expected).all(), n


def test_tasks_are_drawn_at_their_rates_from_the_start_and_far_out() -> None:
    mixture = make({"big": 900, "mid": 90, "rare": 10})
    for start in (0, 1000 * BLOCK):
        drawn = Counter(row.task for row, _ in mixture.window(start, 4 * BLOCK))
        for task, rate in mixture.rates.items():
            assert abs(drawn[task] - rate * 4 * BLOCK) <= 5, task


def test_equal_tasks_are_never_far_apart_nor_in_a_fixed_rotation() -> None:
    tasks = [row.task for row, _ in make(dict.fromkeys("abcdefgh", 10)).window(0, 2 * BLOCK)]
    counts = Counter(tasks)
    assert max(counts.values()) - min(counts.values()) <= 3
    assert tasks[:8] != tasks[8:16]


def test_rare_tasks_do_not_come_all_at_once() -> None:
    # 200 tasks at 1/2200 each: their first draws must be spread over the first 2200 positions.
    sizes = {"big": 2000, **{f"rare{i}": 1 for i in range(200)}}
    blocks = Counter(
        i // BLOCK
        for i, (row, _) in enumerate(make(sizes).window(0, 8 * BLOCK))
        if row.task != "big"
    )
    assert set(blocks) == set(range(8))
    assert max(blocks.values()) < 50


def test_the_order_of_tasks_in_the_file_does_not_matter() -> None:
    rows = make_rows(SIZES)
    config = MixtureConfig(train=["x"])
    mixed = sorted(rows, key=lambda row: (int(row.targets[0]), row.task))
    assert (
        Mixture(rows, TEMPLATES, config, 0).window(0, 300)
        == Mixture(mixed, TEMPLATES, config, 0).window(0, 300)
    )  # fmt: skip


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        make(SIZES).example(-1)


# Choosing tasks -------------------------------------------------------------------------------


def test_tasks_and_exclude_choose_what_is_mixed() -> None:
    assert set(make(SIZES, tasks=["mid", "one"]).sizes) == {"mid", "one"}
    assert set(make(SIZES, exclude=["big"]).sizes) == {"mid", "small", "one"}
    assert make(SIZES).sizes == SIZES


def test_unknown_and_empty_tasks_are_named() -> None:
    with pytest.raises(DataError, match=r"unknown task 'smal' \(did you mean 'small'\?\)"):
        make(SIZES, tasks=["smal"])
    with pytest.raises(DataError, match=r"unknown task 'bigg' \(did you mean 'big'\?\)"):
        make(SIZES, exclude=["bigg"])  # a typo here would train on a held-out task
    with pytest.raises(DataError, match="no rows are left"):
        make({"a": 3}, exclude=["a"])
    templates = Templates({"*": ["{{ input }}"], "void": ["{{ input }}"]})
    config = MixtureConfig(train=["x"], tasks=["big", "void"])
    with pytest.raises(DataError, match="task 'void' has no rows"):
        Mixture(make_rows(SIZES), templates, config, 0)


def test_a_validation_split_may_lack_tasks() -> None:
    config = MixtureConfig(train=["x"], tasks=["a", "b"], exclude=["c"])
    rows = make_rows({"a": 2, "d": 1})
    assert select_rows(rows, config, missing_ok=True) == rows[:2]
    with pytest.raises(DataError, match="unknown task 'b'"):
        select_rows(rows, config)


def test_a_broken_template_is_found_before_the_first_draw() -> None:
    templates = Templates({"*": ["{{ input }}"], "one": ["{{ input }}", "{{ input + 1 }}"]})
    with pytest.raises(DataError, match="task 'one', template 2"):
        Mixture(make_rows(SIZES), templates, MixtureConfig(train=["x"]), 0)


@pytest.mark.parametrize(
    "bad",
    [
        {"train": []},
        {},
        {"train": ["x"], "cap": 0},
        {"train": ["x"], "temperature": 0},
        {"train": ["x"], "temperature": float("inf")},
        {"train": ["x"], "tasks": []},
        {"train": ["x"], "tasks": ["a"], "exclude": ["a"]},
        {"train": ["x"], "temprature": 2},
    ],
)
def test_bad_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MixtureConfig(**bad)  # type: ignore[arg-type]


PINNED = ["C big578", "B big681", "A big246", "A big576", "A big314", "A big630", "B big107"]
