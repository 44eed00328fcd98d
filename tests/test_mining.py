"""Hard negatives: false ones are filtered, and what is left out is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shoulders.errors import DataError
from shoulders.reader.mining import MiningConfig, mine
from shoulders.reader.passage import Found, Passage
from shoulders.reader.questions import Question

TEXTS = {
    "gold": Passage("gold", "Oslo", "It has been the seat of government since 1814."),
    "copy": Passage("copy", "Kristiania", "It has been the seat of government since 1814."),
    "also": Passage("also", "Norway", "Its capital, OSLO, lies on a fjord."),
    "title": Passage("title", "History of Oslo", "It began as a village."),
    "near": Passage("near", "Bergen", "The second largest city of Norway."),
    "far": Passage("far", "Bread", "Flour, water, salt; Oslofjord is not a word of it."),
    "third": Passage("third", "Salt", "A mineral."),
}


class Shelf:
    """A collection that knows `TEXTS`, and a retriever that finds them in a given order."""

    def __init__(self, *orders: str) -> None:
        self.orders = [order.split() for order in orders]
        self.asked: list[int] = []

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        try:
            return [TEXTS[i] for i in ids]
        except KeyError as error:
            raise DataError(f"no passage {error}") from error

    def search(self, questions: Sequence[str], k: int) -> Found:
        self.asked.append(k)
        ids = [self.orders[int(q)][:k] for q in questions]
        return Found(ids, [[1.0 / (n + 1) for n in range(len(row))] for row in ids])


def mine_one(order: str, config: MiningConfig | None = None, **question):
    shelf = Shelf(order)
    asked = Question("0", question.pop("answers", ("Oslo",)), **question)
    return mine([asked], shelf, shelf, config)


def names(passages: Sequence[Passage]) -> str:
    return " ".join(p.id for p in passages)


def test_what_holds_an_answer_is_never_a_negative() -> None:
    mining = mine_one("near also title copy far third gold", gold_passage_id="gold")
    (example,) = mining.examples
    assert example is not None
    assert names(example.positives) == "gold"
    # Without `also` (answer in the text), `title` (in the title), `copy` (the gold's words).
    assert names(example.negatives) == "near far third"
    assert mining.false_negatives == 1
    assert (mining.without_positive, mining.without_negative) == (0, 0)


def test_as_many_as_asked_for_best_first() -> None:
    config = MiningConfig(depth=6, negatives=1, positives=2)
    mining = mine_one("third also near far", config, gold_passage_id="gold")
    (example,) = mining.examples
    assert names(example.positives) == "gold also"
    assert names(example.negatives) == "third"


def test_without_a_gold_passage_the_best_match_is_the_positive() -> None:
    (example,) = mine_one("near far also").examples
    assert names(example.positives) == "also"
    assert names(example.negatives) == "near far"


def test_the_depth_limits_what_is_looked_at() -> None:
    mining = mine_one("near far also", MiningConfig(depth=2))
    assert mining.examples == [None]
    assert mining.without_positive == 1


def test_questions_that_cannot_be_used_keep_their_place_and_are_counted() -> None:
    shelf = Shelf("near far", "also", "", "also near")
    questions = [
        Question("0", ("Oslo",)),  # nobody holds it
        Question("1", ("Oslo",)),  # everybody does
        Question("2", ("Oslo",), "gold"),  # nothing was found
        Question("3", ("Oslo",)),
    ]
    told: list[int] = []
    mining = mine(questions, shelf, shelf, on_questions=told.append)
    assert [example is not None for example in mining.examples] == [False, False, False, True]
    assert (mining.without_positive, mining.without_negative) == (1, 2)
    assert [example.question for example in mining.among([0, 3])] == ["3"]
    assert mining.among([0, 1]) == []
    assert sum(told) == 4


def test_a_gold_passage_outside_the_collection_is_named() -> None:
    with pytest.raises(DataError, match="lost"):
        mine_one("near", gold_passage_id="lost")


def test_no_questions() -> None:
    shelf = Shelf()
    assert mine([], shelf, shelf).examples == []
