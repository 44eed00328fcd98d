"""Text of tokens as they come: what all of them together say, at every token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from shoulders.lm.decode import DecodingConfig, Running, advance
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.written import FAR, NEAR, Written

SAID = "naïve 你好吗 🦥 sleeps\u2028 'round  the  clock. "
END = 256  # says nothing


class Bytes:
    """Every byte is a token, as at worst in byte-level vocabularies."""

    def __init__(self) -> None:
        self.most = 0

    def text(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return bytes(i for i in ids if i != END).decode(errors="replace")

    def tokens(self, text: str) -> list[int]:
        return list(text.encode())


class Words(Bytes):
    """Tokens begin with their space, which the first of a text loses, as in SentencePiece."""

    pieces = ("▁a", "▁the", "ing", "▁▁", "▁", "x", "")

    def text(self, ids: Sequence[int]) -> str:
        self.most = max(self.most, len(ids))
        return "".join(self.pieces[i] for i in ids).replace("▁", " ").removeprefix(" ")

    def tokens(self, text: str) -> list[int]:
        return [ord(c) % len(self.pieces) for c in text]


@pytest.mark.parametrize("kind", [Bytes, Words])
def test_it_is_the_text_of_all_tokens(kind: type[Bytes]) -> None:
    for seed in range(20):
        drawn = random.Random(seed)
        whole, lm = kind(), kind()
        ids = whole.tokens(SAID * 8)
        if seed % 2:  # what no text is
            ids = [drawn.randrange(7 if kind is Words else 257) for _ in range(400)]
        if kind is Bytes and seed % 3 == 0:  # a stretch that says nothing
            ids[100:100] = [END] * 3 * NEAR
        written = Written()
        for n in range(1, len(ids) + 1):
            assert written.of(lm, ids[:n]) == whole.text(ids[:n]), (seed, n)
        assert lm.most <= FAR + 3 * NEAR + 5


class Pieces(Bytes):
    """Pieces that stop strings and answer prefixes are made of, whole and in part."""

    end_ids = (0,)
    said = ("", "a", "b", "\n", " ", "ab", "A:", "A", ":", "é")

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.said[i] for i in ids)


@pytest.mark.parametrize("prefix", ["", "A: ", "A:", "A\nb", "ab", "A: a"])
def test_what_was_streamed_is_the_answer(prefix: str) -> None:
    """Also where stop strings stand in what may still become the prefix, and does not."""
    source, lm = random.Random(0), cast(FrozenLM, Pieces())
    stopped = 0
    for _ in range(1500):
        stop = tuple(source.sample(["\n", "ab", "ba", "aab", "A", "b a", ": ", "é"], 2))
        config = DecodingConfig(max_new_tokens=8, stop=stop, answer_prefix=prefix)
        state = Running(0, 0, config, np.random.default_rng(0), 8)
        streamed, ended = "", None
        while ended is None:
            state.ids.append(source.randrange(source.random() < 0.9, len(Pieces.said)))
            delta = advance(lm, state)
            streamed, ended = streamed + delta.text, delta.completion
        assert streamed == ended.text
        stopped += ended.finish == "stop"
    assert stopped > 500
