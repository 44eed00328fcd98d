"""Batches: a partition within the limits, deterministic, and with little padding."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoulders.data.batching import evenly_grouped, length_grouped

LENGTHS = st.lists(st.integers(0, 60), max_size=80)


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 12))
def test_batches_are_a_partition_within_the_limits(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    batches = length_grouped(lengths, max_tokens, max_rows)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens


@settings(max_examples=50)
@given(LENGTHS, st.integers(1, 200), st.integers(1, 12))
def test_batches_are_as_large_as_the_limits_allow(
    lengths: list[int], max_tokens: int, max_rows: int
) -> None:
    batches = length_grouped(lengths, max_tokens, max_rows)
    for batch, following in itertools.pairwise(batches):
        size = len(batch) + 1
        assert size > max_rows or size * lengths[following[0]] > max_tokens


@given(LENGTHS)
def test_rows_come_by_length_and_ties_by_index(lengths: list[int]) -> None:
    order = [i for batch in length_grouped(lengths, 100, 5) for i in batch]
    assert [(lengths[i], i) for i in order] == sorted((n, i) for i, n in enumerate(lengths))


def test_a_known_split() -> None:
    assert length_grouped([5, 1, 9, 1, 5, 30], max_tokens=10, max_rows=8) == [
        [1, 3],
        [0, 4],
        [2],
        [5],  # longer than max_tokens: alone
    ]
    assert length_grouped([1, 1, 1], max_tokens=100, max_rows=2) == [[0, 1], [2]]
    assert length_grouped([], 10, 10) == []


def padding_share(batches: list[list[int]], lengths: list[int]) -> float:
    used = sum(lengths[index] for batch in batches for index in batch)
    return 1 - used / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def test_grouping_pads_far_less_than_random_batches_do() -> None:
    source = random.Random(0)
    lengths = [source.randint(5, 100) for _ in range(256)]
    unsorted = [list(range(start, start + 16)) for start in range(0, 256, 16)]
    grouped = length_grouped(lengths, max_tokens=1024, max_rows=64)
    assert padding_share(unsorted, lengths) > 0.4
    assert padding_share(grouped, lengths) < 0.1


@pytest.mark.parametrize(
    ("lengths", "tokens", "rows"), [([1], 0, 1), ([1], 1, 0), ([1], -5, 1), ([-1], 5, 5)]
)
def test_impossible_limits_are_refused(lengths: list[int], tokens: int, rows: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1|negative"):
        length_grouped(lengths, tokens, rows)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=90),
    multiple=st.integers(1, 4),
    each=st.integers(0, 50),
)
def test_evenly_grouped_batches_hold_every_row_within_limits(
    lengths: list[int], multiple: int, each: int
) -> None:
    batches = evenly_grouped(lengths, 1000, 16, multiple, each)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 1500
        assert len(batch) <= 16
    ends = [lengths[i] for batch in batches for i in batch]
    assert ends == sorted(ends)


def test_two_streams_get_as_much_to_do() -> None:
    lengths = [20] * 50 + [100] * 14
    costs = [
        sum(lengths[i] + 24 for i in batch) for batch in evenly_grouped(lengths, 2048, 64, 2, 24)
    ]
    assert len(costs) == 2
    assert max(costs) < 1.1 * min(costs)
