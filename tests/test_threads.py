"""Tokenizers are asked from several threads: a fast one keeps how it is asked in itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM

ROUNDS = 1500


@pytest.fixture(autouse=True)
def _often() -> Iterator[None]:
    """Let threads change places as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def beside(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Ask two things again and again at the same time; each must give what it gives alone."""
    wrong: list[str] = []

    def ask(one: Callable[[], object]) -> None:
        for _ in range(ROUNDS):
            try:
                found = one()
            except Exception as error:
                found = error
            if found != alone[one]:
                wrong.append(f"{found} for {alone[one]}")
                return

    alone = {one: one() for one in (first, second)}
    threads = [threading.Thread(target=ask, args=(one,)) for one in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_users_text_is_never_read_as_a_frame(fresh_lm: Callable[..., FrozenLM]) -> None:
    """A chat template's special tokens beside a user's text that looks like them."""
    lm = fresh_lm("llama")
    texts = ["<eos>the capital<eos>", "two"]
    assert lm.tokenize(texts) != lm.tokenize(texts, markup=True)
    beside(lambda: lm.tokenize(texts), lambda: lm.tokenize(texts, markup=True))


def test_an_encoder_cuts_each_text_where_it_was_told(tiny_encoder: FrozenEncoder) -> None:
    texts = ["the capital of france " * 9]
    assert tiny_encoder.tokenize(texts) != tiny_encoder.tokenize(texts, room=5)
    beside(lambda: tiny_encoder.tokenize(texts), lambda: tiny_encoder.tokenize(texts, room=5))
