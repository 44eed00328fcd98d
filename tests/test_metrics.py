"""Metrics: normalisers, SQuAD's scores, macro average and its interval."""

from __future__ import annotations

import re
import string
import unicodedata

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoulders.errors import DataError
from shoulders.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    macro_average,
    normalize,
    normalize_squad,
    paired_interval,
    token_f1,
)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Paris", " paris.\n"),
        ("The  artist\twas thanked .", "the artist was thanked"),
        ("cafe\u0301", "CAFÉ"),
        ("STRASSE", "straße"),
        ("a\u00a0b", "a b"),
        ("Å", "\u212b"),  # the angstrom sign is canonically the letter
        ("e.g.", "E.G"),
    ],
)
def test_normalize_makes_equal_what_differs_in_form_only(left: str, right: str) -> None:
    assert normalize(left) == normalize(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("cafe", "café"),
        ("the cat", "cat"),
        ("well-known", "well known"),
        ("same", "not the same"),
        ("What?", "What"),
        ("Stop!", "Stop"),
        ("wait...", "wait"),
        ("wait..", "wait"),
        (".", ""),
        ("3.5", "35"),
        ("3.0", "3"),
        ("-3", "3"),
        ("5,000", "5000"),
        ("x²", "x2"),  # NFKC would make these two equal
        ("f a m", "fam"),
        ('"yes"', "yes"),
        ("a b", "b a"),
    ],
)
def test_normalize_keeps_apart_what_differs_in_content(left: str, right: str) -> None:
    assert normalize(left) != normalize(right)
    assert exact_match(left, [right]) == 0.0


@settings(max_examples=150)
@given(st.text())
@example("a. .")
@example("\u0345\u0301")
def test_normalize_is_idempotent_and_blind_to_composition(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once
    assert normalize(unicodedata.normalize("NFD", text)) == once
    assert normalize(f"  {text}\n") == once


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  a  an  the ", ""),
        ("An apple a day", "apple day"),
        ("theory of an anthem", "theory of anthem"),  # articles are whole words only
        ("Theatre", "theatre"),
        ("state-of-the-art", "stateoftheart"),  # punctuation goes first, so 'the' is no word
        ("the-cat", "thecat"),
        ("U.S.A.", "usa"),
        ("A.", ""),
        ("$1,000.50", "100050"),
        ("-5", "5"),
        ("don't", "dont"),
        ("don’t", "don’t"),  # the curly apostrophe is not in string.punctuation
        ("«Le Monde»", "«le monde»"),
        ("Straße", "straße"),  # lower, not casefold
        ("ÉCOLE", "école"),
        ("a\u00a0b", "b"),
        ("à la carte", "à la carte"),  # accented: another word than the article
        ("the_end", "theend"),
        ("1 a 2", "1 2"),
        ("a—b", "—b"),  # a dash outside ASCII stays, and is a word boundary
    ],
)
def test_normalize_squad_follows_the_official_script(text: str, expected: str) -> None:
    assert normalize_squad(text) == expected


def official(text: str) -> str:
    """SQuAD's evaluate-v2.0.py, retyped step by step as an oracle."""
    text = text.lower()
    exclude = set(string.punctuation)
    text = "".join(character for character in text if character not in exclude)
    text = re.sub(re.compile(r"\b(a|an|the)\b", re.UNICODE), " ", text)
    return " ".join(text.split())


@settings(max_examples=100)
@given(st.one_of(st.text(), st.text(alphabet="aAnthe -.,'_é’1\u00a0")))
def test_normalize_squad_equals_the_oracle(text: str) -> None:
    assert normalize_squad(text) == official(text)


def test_exact_match_takes_the_best_of_several_answers() -> None:
    targets = ["14 December 1972 UTC", "December 1972"]
    assert exact_match("december 1972", targets) == 1.0
    assert exact_match("1972", targets) == 0.0
    assert exact_match("The December, 1972", targets) == 0.0
    assert exact_match("The December, 1972", targets, normalize_squad) == 1.0


@pytest.mark.parametrize(
    ("prediction", "targets", "expected"),
    [
        ("the cat sat", ["cat sat"], 1.0),
        ("cat", ["cat sat"], 2 / 3),
        ("cat sat on mat", ["cat sat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),  # a repeated token counts once per occurrence
        ("cat cat cat", ["cat cat"], 0.8),
        ("sat cat", ["cat sat"], 1.0),  # order does not matter
        ("dog", ["cat"], 0.0),
        ("dog", ["cat", "hot dog", "dog"], 1.0),
        ("dog house", ["cat", "hot dog"], 0.5),
        ("", ["cat"], 0.0),
        ("the", ["cat"], 0.0),
        ("cat", ["the"], 0.0),
        ("", ["the"], 1.0),
        ("1,000", ["1000"], 1.0),
    ],
)
def test_token_f1(prediction: str, targets: list[str], expected: float) -> None:
    assert token_f1(prediction, targets) == pytest.approx(expected)


@pytest.mark.parametrize("targets", [[], "cat"])
def test_scores_need_a_list_of_targets(targets: list[str]) -> None:
    for score in (exact_match, token_f1):
        with pytest.raises(ValueError, match="non-empty sequence"):
            score("cat", targets)


def test_macro_average_weighs_tasks_not_rows() -> None:
    assert macro_average({"a": [1.0] * 99 + [0.0], "b": [0.0]}) == pytest.approx(49.5)
    assert macro_average({"a": [1], "b": [0.5, 0]}) == pytest.approx(62.5)


def test_averages_refuse_empty_and_impossible_scores() -> None:
    for average in (macro_average, bootstrap_interval):
        with pytest.raises(DataError, match="no tasks"):
            average({})
        with pytest.raises(DataError, match="task 'b' has no scored rows"):
            average({"a": [1.0], "b": []})
        for bad in (float("nan"), 1.5, -0.1, float("inf")):
            with pytest.raises(ValueError, match="task 'a'"):
                average({"a": [1.0, bad]})


def test_the_interval_matches_one_from_resampled_rows() -> None:
    """The multinomial shortcut is the bootstrap of rows, here done naively row by row."""
    source = np.random.default_rng(3)
    scores = {"a": source.random(40).round(1), "b": (source.random(15) < 0.3).astype(float)}
    means = np.mean(
        [s[source.integers(0, len(s), (20000, len(s)))].mean(axis=1) for s in scores.values()],
        axis=0,
    )
    expected = 100 * np.quantile(means, [0.025, 0.975])
    low, high = bootstrap_interval({k: list(v) for k, v in scores.items()}, resamples=20000)
    assert [low, high] == pytest.approx(expected, abs=0.7)


def test_the_interval_is_stratified_by_task() -> None:
    # Each task is constant, so resampling within tasks cannot change the average.
    assert bootstrap_interval({"a": [1.0] * 6, "b": [0.0] * 50}) == (50.0, 50.0)


def test_the_interval_is_deterministic_and_blind_to_task_order() -> None:
    scores = {"a": [0.0, 1.0, 1.0, 0.2], "b": [1.0, 0.0, 0.4]}
    first = bootstrap_interval(scores, seed=5)
    assert first == bootstrap_interval(dict(reversed(scores.items())), seed=5)
    assert first != bootstrap_interval(scores, seed=6)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=3),
        st.lists(st.floats(0, 1), min_size=1, max_size=30),
        min_size=1,
        max_size=4,
    )
)
def test_a_wider_level_gives_a_wider_interval(scores: dict[str, list[float]]) -> None:
    low90, high90 = bootstrap_interval(scores, level=0.9, resamples=300)
    low99, high99 = bootstrap_interval(scores, level=0.99, resamples=300)
    tiny = 1e-9
    assert -tiny <= low99 <= low90 + tiny
    assert low90 <= high90 + tiny
    assert high90 <= high99 + tiny <= 100 + 2 * tiny


def test_more_rows_give_a_narrower_interval() -> None:
    few = bootstrap_interval({"a": [0.0, 1.0] * 10})
    many = bootstrap_interval({"a": [0.0, 1.0] * 1000})
    assert (many[1] - many[0]) < 0.2 * (few[1] - few[0])


@pytest.mark.parametrize("bad", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_the_interval_refuses_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_interval({"a": [1.0]}, **bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tasks", "rows"), [(30, 1), (30, 2), (20, 3), (1, 40), (2, 1), (1, 3)])
def test_equally_good_methods_are_seldom_called_different(tasks: int, rows: int) -> None:
    """At a level of 95% one comparison in twenty may err; a few more are let pass here."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(200):
        a, b = (
            {
                str(t): (random.random(rows) < 0.3 + 0.4 * (t % 2)).astype(float)
                for t in range(tasks)
            }
            for _ in range(2)
        )
        _, low, high = paired_interval(a, b, resamples=400)
        wrong += low > 0 or high < 0
    assert wrong <= 18


def test_a_task_of_one_row_has_width_too() -> None:
    low, high = bootstrap_interval({"a": [1], "b": [0], "c": [1, 1, 0, 1]})
    assert low < 40 < 80 < high
    low, high = bootstrap_interval({"a": [1], "c": [1, 1, 0, 1]})
    assert high - low > 20
    assert bootstrap_interval({"a": [1]}) == (0, 100)
    assert paired_interval({"a": [1]}, {"a": [0]}) == (100, -100, 100)


def test_two_rows_of_a_task_make_nothing_sure() -> None:
    """Methods that differ in both rows of one small task of many, and in nothing else."""
    first = {f"t{i}": [1.0, 1.0] if i == 0 else [0.0, 0.0] for i in range(30)}
    second = {f"t{i}": [0.0, 0.0] for i in range(30)}
    difference, low, high = paired_interval(first, second)
    assert difference == pytest.approx(100 / 30)
    assert low < 0 < high
