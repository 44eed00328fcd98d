"""The rarest words of an input spelled out ahead of it: letters are what an LM's tokens hide."""

from __future__ import annotations

import re

from shoulders.lm.frozen import FrozenLM

WORD = re.compile(r"[^\W\d_]+")
BETWEEN, AFTER = ";", "\n"


def spelled(lm: FrozenLM, text: str, letters: int) -> str:
    """Return the rarest words of a text with spaces between their letters.

    A word is the rarer the more tokens it takes, then the higher the last of their ids, which
    vocabularies number by frequency. Words are added as long as they fit into so many `letters`
    (the first is cut to them), and stand in order of rarity. A text without words gives "".

    Examples:
        >>> from shoulders.lm.load import load_lm
        >>> spelled(load_lm("embedded"), "What is the second letter of fare?", 10)
        ' f a r e; l e t t e r\\n'
    """
    words = list(dict.fromkeys(WORD.findall(text)))
    tokens = lm.tokenize([" " + word.lower() for word in words]) if words else []
    rarity = {word: (len(ids), max(ids)) for word, ids in zip(words, tokens, strict=True)}
    found: list[str] = []
    left = letters
    for word in sorted(words, key=rarity.__getitem__, reverse=True):
        if not found or len(word) <= left:
            found.append(" " + " ".join(word[:letters]))
            left -= len(word)
    return BETWEEN.join(found) + AFTER if found else ""


def most_tokens(letters: int) -> int:
    """Return the most tokens that so many letters can take: each with one before it, and the end.

    Letters that are no token of their own take up to four, their bytes.
    """
    return 5 * letters + 1
