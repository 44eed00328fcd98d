"""Answer match as DPR scores retrieval: against a slow reading of its rule, and by hand."""

from __future__ import annotations

import time
import unicodedata

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from shoulders.reader.answers import has_answer


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("He lived in Paris, France.", ["paris"], True),
        ("The comparison was apt.", ["paris"], False),  # not inside a word
        ("the ART of war", ["Art of War"], True),
        ("the art, of war", ["art of war"], False),  # punctuation is a token too
        ("released in the U.S. in 1999", ["U.S."], True),
        ("released in the US in 1999", ["U.S."], False),
        ("7,731,004 SEK", ["7,731,004"], True),
        ("7,731,004 SEK", ["7731004"], False),
        ("in 1901 and 1972", ["190"], False),
        ("700–1000 AD", ["700–1000 AD"], True),
        ("700-1000 AD", ["700–1000 AD"], False),  # an en dash is no hyphen
        ("$3.5 million", ["3.5"], True),
        ("Conrad Röntgen", ["ro\u0308ntgen"], True),  # composed and decomposed
        ("Conrad Röntgen", ["rontgen"], False),  # a mark belongs to its word
        ("ΟΔΟΣ's end", ["οδος"], True),
        ("东京 is Tokyo", ["东京"], True),
        ("on\nthe \t Western\u00a0Front", ["on the western front"], True),  # any white space
        ("High Sierra", ["10.13.4", "macOS High Sierra", "high sierra"], True),  # any of several
        ("High Sierra", ["10.13.4", "macOS High Sierra"], False),
        ("don't stop", ["don't"], True),
        ("don't stop", ["don"], True),  # as DPR has it: the apostrophe ends the token
        ("anything", [], False),
        ("anything", [""], False),
        ("anything", [" \n"], False),
        ("", ["answer"], False),
        ("a b a c", ["a c"], True),  # the first try fails in the middle
        ("Zürich\u200bsee", ["zürich"], True),  # an invisible character separates
    ],
)
def test_by_hand(text: str, answers: list[str], expected: bool) -> None:
    assert has_answer(text, answers) is expected


def test_a_plain_text_is_refused_as_answers() -> None:
    with pytest.raises(ValueError, match="sequence"):
        has_answer("Paris", "Paris")


def _slowly(text: str, answers: list[str]) -> bool:
    """Every window of tokens beside every answer's, as the rule reads."""

    def tokens(value: str) -> list[str]:
        value = unicodedata.normalize("NFD", value)
        return [t.lower() for t in regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", value)]

    words = tokens(text)
    for wanted in filter(None, map(tokens, answers)):
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return True
    return False


_letters = st.text(st.sampled_from("aAbB éÉσςΣİıßẞ1２,.'- \u0301\u00a0\u200b東ﬁ"), max_size=8)


@settings(max_examples=500, deadline=None)
@given(st.lists(_letters, max_size=6), st.lists(_letters, max_size=3))
def test_equals_the_rule_read_slowly(parts: list[str], answers: list[str]) -> None:
    text = " ".join(parts)
    assert has_answer(text, answers) == _slowly(text, answers)
    some = parts[1:3]
    assert has_answer(text, some) == _slowly(text, some)


def test_a_hundred_thousand_passages_take_seconds() -> None:
    passage = "The quick brown fox, which nobody had seen in 1901, jumped over Zürich. " * 8
    started = time.perf_counter()
    for _ in range(2000):
        has_answer(passage, ["a lazy dog", "1902"])
        has_answer(passage, ["Zürich again", "quick fox"])  # all tokens there, in another order
    assert time.perf_counter() - started < 2 * 2000 * 1e-3  # a lenient millisecond each
