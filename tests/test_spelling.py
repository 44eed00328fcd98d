"""Words spelled out ahead of an input: which ones, and where they stand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shoulders.errors import WindowError
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.skill import Skill
from shoulders.skills.spelling import most_tokens, spelled


@pytest.fixture
def lm(tiny_lm: Callable[[str], FrozenLM]) -> FrozenLM:
    return tiny_lm("llama")


def test_the_rarest_words_come_first_as_far_as_there_is_room(lm: FrozenLM) -> None:
    """`the` is one token of the tiny vocabulary, `zebra` several."""
    counts = [len(ids) for ids in lm.tokenize([" the", " capital", " zebra"])]
    assert counts[0] == counts[1] == 1 < counts[2]
    text = "The zebra, the capital: 12 the"
    assert spelled(lm, text, 30).startswith(" z e b r a;")
    whole = spelled(lm, text, 15)
    assert whole.split(";")[0] == " z e b r a"
    assert sorted(whole.strip().split("; ")) == sorted(["z e b r a", "T h e", "c a p i t a l"])
    assert spelled(lm, text, 5) == " z e b r a\n"
    assert spelled(lm, text, 3) == " z e b\n"
    assert "c a p i t a l" not in spelled(lm, text, 8)  # does not fit; a shorter word may


@pytest.mark.parametrize("text", ["", "12 + 30 = ?", "_ ..."])
def test_a_text_without_words_has_nothing_spelled(lm: FrozenLM, text: str) -> None:
    assert spelled(lm, text, 20) == ""


def skill_of(lm: FrozenLM, spelling: int) -> Skill:
    return Skill.base(lm, SkillConfig(format=TextFormat(spelling=spelling)))


def test_letters_stand_ahead_of_the_input_and_change_nothing_behind(lm: FrozenLM) -> None:
    texts = ["Who saw the zebra?", "12 + 3"]
    plain, ahead = (skill_of(lm, n).input_ids(texts) for n in (0, 8))
    letters = lm.tokenize([spelled(lm, texts[0], 8)])[0]
    assert ahead[0] == letters + plain[0]
    assert ahead[1] == plain[1]


def test_letters_are_counted_in_the_window(lm: FrozenLM) -> None:
    skill = skill_of(lm, 8)
    assert skill_of(lm, 0).input_room() - skill.input_room() == most_tokens(8)
    room = skill.input_room()
    (token,) = lm.tokenize([" the"])[0]
    assert len(lm.tokenize([" the" * room])[0]) == room
    (ids,) = skill.input_ids([" the" * room])
    assert ids.count(token) == room
    assert len(ids) <= lm.max_positions
    with pytest.raises(WindowError, match="row 1"):
        skill.input_ids([" the" * (room + 1)])


@pytest.mark.parametrize("text", ["żółć", "日本語の文章", "naïve"])
def test_letters_of_any_script_fit_into_what_is_counted(lm: FrozenLM, text: str) -> None:
    for letters in (1, 4, 12):
        (ids,) = lm.tokenize([spelled(lm, text, letters)])
        assert len(ids) <= most_tokens(letters)
