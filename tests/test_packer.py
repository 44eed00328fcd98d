"""The packer fills the window as far as whole sentences go, and always keeps the question."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoulders.errors import WindowError
from shoulders.reader.packer import PackConfig, pack, sentences, shown
from shoulders.reader.passage import Passage

ASKED = "Question: who was it?"


def words(text: str) -> int:
    return len(text.split())


def passage(id: str, *sizes: int, title: str = "") -> Passage:
    """Return a passage of sentences of so many words each."""
    text = " ".join(" ".join([f"{id}{i}"] * (n - 1) + ["end."]) for i, n in enumerate(sizes))
    return Passage(id, title, text)


def test_whole_passages_in_descending_score_then_sentences_of_the_next() -> None:
    several = [passage("aa", 5, 5), passage("bb", 4, 4, 4), passage("cc", 2)]
    packed = pack("who was it?", several, PackConfig(tokens=19), words, 1000)
    assert [p.id for p in packed.used] == ["aa", "bb"]
    assert packed.cut
    assert packed.used[1].text == "bb0 bb0 bb0 end. bb1 bb1 bb1 end."
    assert packed.left_out == ("cc",), "nothing is packed after a passage that was cut"
    assert packed.tokens == 18
    assert packed.text == f"{several[0].text}\n\n{packed.used[1].text}\n\n{ASKED}"


def test_a_first_sentence_too_long_leaves_the_passage_out() -> None:
    several = [passage("aa", 5), passage("bb", 30, 2), passage("cc", 1)]
    packed = pack("who was it?", several, PackConfig(tokens=10), words, 1000)
    assert ([p.id for p in packed.used], packed.cut) == (["aa"], False)
    assert packed.left_out == ("bb", "cc")


def test_of_the_best_passage_lines_or_words_are_read_where_no_sentence_fits() -> None:
    table = Passage("aa", "", "\n".join(f"| station {i} | 19{i:02} |" for i in range(40)))
    packed = pack("who was it?", [table, passage("bb", 1)], PackConfig(tokens=20), words, 1000)
    assert [p.text for p in packed.used] == ["\n".join(table.text.splitlines()[:3])]
    assert (packed.cut, packed.left_out) == (True, ("bb",))
    packed = pack("who was it?", [passage("aa", 50)], PackConfig(tokens=3), words, 1000)
    assert [p.text for p in packed.used] == ["aa0 aa0 aa0"]


def test_text_without_spaces_is_read_by_sentences_and_by_letters() -> None:
    text = "北京大学创办于一八九八年。" * 30
    packed = pack("谁?", [Passage("aa", "", text)], PackConfig(tokens=30), len, 1000)
    assert [p.text for p in packed.used] == ["北京大学创办于一八九八年。" * 2]
    endless = Passage("bb", "", "北京大学" * 100)
    packed = pack("谁?", [endless], PackConfig(tokens=30), len, 1000)
    assert [len(p.text) for p in packed.used] == [28]  # and what separates it from the question


def test_the_best_may_stand_next_to_the_question() -> None:
    several = [passage("aa", 3, title="A a"), passage("bb", 3, title="B b")]
    config = PackConfig(tokens=None, order="best_last")
    packed = pack("who was it?", several, config, words, 1000)
    assert packed.text == f"{shown(several[1], config)}\n\n{shown(several[0], config)}\n\n{ASKED}"
    assert [p.id for p in packed.used] == ["aa", "bb"]


def test_the_question_is_never_lost() -> None:
    several = [passage("aa", 5)]
    packed = pack("who was it?", several, PackConfig(), words, 4)
    assert packed.text == ASKED
    assert (packed.used, packed.tokens, packed.left_out) == ((), 0, ("aa",))
    with pytest.raises(WindowError, match="4 tokens, 3 fit"):
        pack("who was it?", several, PackConfig(), words, 3)
    assert pack("who was it?", [], PackConfig(), words, 9).text == ASKED


def test_no_more_passages_than_asked_for() -> None:
    several = [passage(f"p{i}", 3) for i in range(5)]
    packed = pack("who was it?", several, PackConfig(passages=2), words, 1000)
    assert len(packed.used) == 2
    assert packed.left_out == ("p2", "p3", "p4")


@given(
    sizes=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), max_size=5),
    tokens=st.none() | st.integers(1, 60),
    room=st.integers(4, 80),
    order=st.sampled_from(["best_first", "best_last"]),
)
def test_whatever_is_packed_fits_and_nothing_smaller_was_possible(
    sizes: list[list[int]], tokens: int | None, room: int, order: str
) -> None:
    several = [passage(f"p{i}", *own) for i, own in enumerate(sizes)]
    config = PackConfig.model_validate({"tokens": tokens, "order": order})
    packed = pack("who was it?", several, config, words, room)
    assert words(packed.text) <= room
    assert tokens is None or packed.tokens <= tokens
    assert packed.text.endswith(ASKED)
    whole = packed.used[:-1] if packed.cut else packed.used
    assert whole == tuple(several[: len(whole)])
    assert len(packed.used) + len(packed.left_out) == len(several)
    if packed.left_out and not packed.cut:  # not even one more sentence would have fitted
        first = words(sentences(several[len(whole)].text)[0])
        assert words(packed.text) + first > room or (
            tokens is not None and packed.tokens + first > tokens
        )


@given(st.text(alphabet='ab .!?"U3\n', max_size=60))
def test_sentences_joined_are_the_text(text: str) -> None:
    assert "".join(sentences(text)) == text


def test_initials_and_numbers_do_not_end_a_sentence() -> None:
    text = 'J. R. R. Tolkien of the U.S. wrote 3.5 books. He said: "No!" Then he left.'
    assert [s.strip() for s in sentences(text)] == [
        "J. R. R. Tolkien of the U.S. wrote 3.5 books.",
        'He said: "No!"',
        "Then he left.",
    ]
