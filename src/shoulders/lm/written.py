"""The text of tokens as they come, without reading all of them again for every new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

FAR, NEAR = 64, 16  # tokens that are read again and again: at most so many, then so few


class Reads(Protocol):
    """Turns tokens into text: a `FrozenLM`."""

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        ...


class Written:
    """The text of one sample's tokens so far.

    Tokens cannot be read one by one: a character may take several, and some tokenizers leave out
    the space before the first. So the last ones are read together, behind what is settled.
    """

    def __init__(self) -> None:
        self._settled, self._begin = "", 0

    def of(self, lm: Reads, ids: Sequence[int]) -> str:
        """Return the text of `ids`, which begin with those of all calls before."""
        unsettled = lm.text(ids[self._begin :])
        text = self._settled + unsettled
        if len(ids) - self._begin > FAR:
            begin = len(ids) - NEAR
            near = lm.text(ids[begin:])
            # Otherwise the cut lies in a character, or all that follows it says nothing.
            if near and unsettled.endswith(near):
                self._settled, self._begin = text[: len(text) - len(near)], begin
        return text
