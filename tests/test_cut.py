"""Cutting documents: no word lost or cut, sizes as promised, sentences and headings kept whole."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoulders.reader.collections.cut import MAX_WORD, WORDS, Block, cut

WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=1, max_size=12)
SPACE = st.sampled_from([" ", "  ", "\n", "\t", ". ", '." ', "! ", "? ", " \n"])
BLOCKS = st.lists(
    st.tuples(st.lists(st.tuples(WORD, SPACE), max_size=60), st.booleans()), max_size=12
)


def blocks_of(parts: list[tuple[list[tuple[str, str]], bool]]) -> list[Block]:
    return [Block("".join(w + s for w, s in words), heading) for words, heading in parts]


@settings(max_examples=60, deadline=None)
@given(BLOCKS, st.integers(10, 40))
def test_every_word_is_kept_whole_and_in_order(
    parts: list[tuple[list[tuple[str, str]], bool]], size: int
) -> None:
    blocks = blocks_of(parts)
    passages = list(cut(iter(blocks), size))
    assert " ".join(passages).split() == " ".join(b.text for b in blocks).split()
    for passage in passages:
        assert passage == " ".join(passage.split())
        assert 0 < len(passage.split()) <= size * 1.25


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), max_size=3000))
def test_a_run_without_spaces_is_cut_but_no_character_is_lost(run: str) -> None:
    passages = list(cut([Block(run)]))
    assert "".join(passages).replace(" ", "") == run
    assert all(len(word) <= MAX_WORD for passage in passages for word in passage.split())
    assert all(len(passage) <= 25 * WORDS for passage in passages)


def test_chinese_is_cut_at_the_end_of_its_sentences() -> None:
    text = "这是一个句子。" * 200
    passages = list(cut([Block(text)]))
    assert all(word.endswith("。") for passage in passages for word in passage.split())


def test_passages_end_where_sentences_do() -> None:
    sentence = "This sentence has exactly eight words in it. "
    passages = list(cut([Block(sentence * 100)]))
    assert [len(p.split()) for p in passages[:-1]] == [96] * (len(passages) - 1)
    assert all(p.endswith("it.") for p in passages)


def test_a_sentence_longer_than_a_passage_is_cut_in_even_parts() -> None:
    passages = list(cut([Block("word " * 250 + "end.")]))
    assert [len(p.split()) for p in passages] == [84, 84, 83]


def test_a_heading_stays_with_what_follows() -> None:
    body = "Eight words are what this sentence is of. "
    passages = list(cut([Block(body * 7), Block("Second part", heading=True), Block(body * 7)]))
    assert len(passages) == 2
    assert passages[1].startswith("Second part Eight")
    # A heading that would end a passage moves to the next one.
    passages = list(cut([Block(body * 5), Block("Part", heading=True), Block("word " * 70)]))
    assert [p.split()[0] for p in passages] == ["Eight", "Part"]
    # Unless it would not fit there.
    blocks = [Block("a"), Block("four words of heading", heading=True), Block("word " * 9)]
    assert [len(p.split()) for p in cut(blocks, 10)] == [5, 9]


def test_a_small_rest_joins_the_passage_before() -> None:
    body = "Eight words are what this sentence is of. "
    assert len(list(cut([Block(body * 12 + "A small rest.")]))) == 1
    assert list(cut([Block("Only this.")])) == ["Only this."]
    assert list(cut([Block(" \n ")])) == []


@pytest.mark.parametrize("text", ["word " * 100_000, "x" * 1_000_000, "A b. " * 50_000])
def test_time_grows_with_the_text_only(text: str) -> None:
    def seconds(part: str) -> float:
        began = time.process_time()
        count = sum(1 for _ in cut([Block(part)]))
        assert count
        return time.process_time() - began

    small = max(seconds(text[: len(text) // 8]), 0.01)
    assert seconds(text) < 8 * 4 * small, "eight times the text, far more than eight times as long"
