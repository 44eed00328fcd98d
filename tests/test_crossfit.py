"""Cross-fitting: no question is scored by a model that saw it, and a killed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from shoulders.errors import TrainingError
from shoulders.reader.crossfit import cross_fitted, folds_of
from shoulders.reader.passage import Passage

QUESTIONS = [f"question {i}" for i in range(9)] + ["Question  3", "QUESTION 8"]
PASSAGES = [[Passage(f"{i}-{j}", "", f"text {i} {j}") for j in range(i % 4)] for i in range(11)]
RETRIEVED = [[float(-j) for j in range(i % 4)] for i in range(11)]


class Memory:
    """Scores 1 for a question that it was trained on and 0 for one that it was not."""

    def __init__(self, seen: set[str]) -> None:
        self.seen = seen

    def score(
        self, questions: Sequence[str], passages: Sequence[Sequence[Passage]], retrieved, *,
        on_pairs=None,
    ) -> list[list[float]]:  # fmt: skip
        if on_pairs is not None:
            on_pairs(sum(map(len, passages)))
        known = [float(" ".join(q.lower().split()) in self.seen) for q in questions]
        return [[value] * len(own) for value, own in zip(known, passages, strict=True)]


def fitted(cache: Path, trainings: list[list[int]], **changed):
    def train(kept: list[int]) -> Memory:
        trainings.append(kept)
        return Memory({" ".join(QUESTIONS[i].lower().split()) for i in kept})

    arguments = {"folds": 3, "seed": 0, "cache": cache, "settings": {"lr": 1}} | changed
    train = arguments.pop("train", train)
    return cross_fitted(train, QUESTIONS, PASSAGES, RETRIEVED, **arguments)


def test_no_question_is_scored_by_a_model_that_saw_it(tmp_path: Path) -> None:
    trainings: list[list[int]] = []
    pairs: list[int] = []
    scores = fitted(tmp_path, trainings, on_pairs=pairs.append)
    assert [len(row) for row in scores] == [len(row) for row in PASSAGES]
    assert {value for row in scores for value in row} == {0.0}
    assert len(trainings) == 3
    assert all(sum(i in kept for kept in trainings) == 2 for i in range(len(QUESTIONS)))
    assert sum(pairs) == sum(map(len, PASSAGES))


@pytest.mark.parametrize("seed", range(4))
def test_folds_part_questions_but_not_their_repetitions(seed: int) -> None:
    folds = folds_of(QUESTIONS, 4, seed)
    assert sorted(i for fold in folds for i in fold) == list(range(11))
    assert max(map(len, folds)) - min(map(len, folds)) <= 2
    fold_of = {i: number for number, fold in enumerate(folds) for i in fold}
    assert fold_of[3] == fold_of[9]
    assert fold_of[8] == fold_of[10]
    assert folds == folds_of(QUESTIONS, 4, seed)


def test_the_split_depends_on_the_seed() -> None:
    assert folds_of(QUESTIONS, 3, 0) != folds_of(QUESTIONS, 3, 1)


@pytest.mark.parametrize("folds", [1, 10])
def test_impossible_folds_are_refused(folds: int) -> None:
    with pytest.raises(TrainingError, match="9 distinct"):
        folds_of(QUESTIONS, folds, 0)


def test_a_killed_run_goes_on_with_its_finished_folds(tmp_path: Path) -> None:
    undisturbed = fitted(tmp_path / "a", [])
    trainings: list[list[int]] = []

    def killed(kept: list[int]) -> Memory:
        if trainings:
            raise KeyboardInterrupt
        trainings.append(kept)
        return Memory({" ".join(QUESTIONS[i].lower().split()) for i in kept})

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "b", [], train=killed)
    (tmp_path / "b" / ".fold.json.partial-x").write_text("{")
    later: list[list[int]] = []
    assert fitted(tmp_path / "b", later) == undisturbed
    assert len(later) == 2
    assert trainings[0] not in later
    assert not list((tmp_path / "b").glob(".*"))


def test_finished_folds_are_not_trained_again_unless_something_changed(tmp_path: Path) -> None:
    trainings: list[list[int]] = []
    for expected, changed in [
        (3, {}),
        (3, {}),  # all read
        (6, {"settings": {"lr": 2}}),
        (9, {"seed": 1}),
        (11, {"folds": 2}),
        (11, {}),
    ]:
        fitted(tmp_path, trainings, **changed)
        assert len(trainings) == expected
    PASSAGES[5][0] = Passage("5-0", "", "other text")
    try:
        fitted(tmp_path, trainings)
    finally:
        PASSAGES[5][0] = Passage("5-0", "", "text 5 0")
    assert len(trainings) == 14


@pytest.mark.parametrize("text", ["", "{", "[]", '{"scores": [[1]]}'])
def test_a_spoilt_fold_is_computed_again(tmp_path: Path, text: str) -> None:
    trainings: list[list[int]] = []
    expected = fitted(tmp_path, trainings)
    next(tmp_path.glob("fold-2-*.json")).write_text(text)
    assert fitted(tmp_path, trainings) == expected
    assert len(trainings) == 4
