"""What all re-rankers share: order, ties, empty rows, batches."""

from __future__ import annotations

import pytest

from shoulders.errors import ShouldersError
from shoulders.reader.passage import Found, Passage
from shoulders.reader.reranker import (
    RetrieverScores,
    check_shapes,
    found_passages,
    headed,
    length_sorted,
    reordered,
    reranked,
)

FOUND = Found([["a", "b", "c", "d"], [], ["e"]], [[4.0, 3.0, 2.0, 1.0], [], [9.0]])


class Shelf:
    def __init__(self) -> None:
        self.fetched: list[str] = []

    def passages(self, ids):
        self.fetched.extend(ids)
        return [Passage(i, "", f"text of {i}") for i in ids]


def test_best_first_and_ties_keep_the_retrievers_order() -> None:
    result = reordered(FOUND, [[1.0, 5.0, 1.0, 5.0], [], [0.0]])
    assert result.ids == [["b", "d", "a", "c"], [], ["e"]]
    assert result.scores == [[5.0, 5.0, 1.0, 1.0], [], [0.0]]
    assert FOUND.ids[0] == ["a", "b", "c", "d"]  # untouched
    assert reordered(FOUND, [[0.0] * 4, [], [0.0]]).ids == FOUND.ids


def test_infinite_scores_have_a_place_and_nan_has_none() -> None:
    result = reordered(FOUND, [[float("-inf"), 0.0, float("inf"), 1.0], [], [0.0]])
    assert result.ids[0] == ["c", "d", "b", "a"]
    with pytest.raises(ShouldersError, match="question 1"):
        reordered(FOUND, [[1.0, float("nan"), 2.0, 3.0], [], [0.0]])


def test_a_score_for_every_passage_of_every_question() -> None:
    with pytest.raises(ValueError, match="question 1: 3 scores for 4"):
        reordered(FOUND, [[1.0, 2.0, 3.0], [], [0.0]])
    with pytest.raises(ValueError):
        reordered(FOUND, [[1.0] * 4])
    with pytest.raises(ValueError, match="2 questions"):
        check_shapes(["a", "b"], [[]], [[]])
    with pytest.raises(ValueError, match="question 2: 1 scores for 0"):
        check_shapes(["a", "b"], [[], []], [[], [1.0]])


def test_the_retrievers_scores_change_nothing() -> None:
    shelf = Shelf()
    passages = found_passages(Found([["a", "b"], [], ["b"]], [[2, 1], [], [1]]), shelf)
    assert [[p.id for p in row] for row in passages] == [["a", "b"], [], ["b"]]
    assert shelf.fetched == ["a", "b"]
    told: list[int] = []
    passages = found_passages(FOUND, shelf)
    assert reranked(FOUND, RetrieverScores(), ["q"] * 3, passages, on_pairs=told.append) == FOUND
    assert told == [5]


def test_the_title_stands_above_the_text() -> None:
    assert headed(Passage("a", "Title", "Text")) == "Title\nText"
    assert headed(Passage("a", "", "Text")) == "Text"


def test_batches_of_similar_length() -> None:
    lengths = [3, 100, 5, 0, 90, 5, 1000]
    batches = length_sorted(lengths, 200, 3)
    assert batches == [[6], [1, 4], [2, 5, 0], [3]]
    assert length_sorted([], 10, 10) == []
    assert length_sorted([0, 0], 1, 1) == [[0], [1]]
