"""Whether a passage holds an answer, by the rule that retrieval for open-domain QA is scored with.

As in DPR's evaluation (Karpukhin et al. 2020, arXiv 2004.04906; its tokenizer is DrQA's, Chen et
al. 2017): text and answer are decomposed (Unicode NFD) and split into runs of letters, digits and
marks, and single other visible characters; the answer's tokens, in lower case, must follow each
other somewhere in the text's. `art` is therefore not in `party`, and `1,000` is not `1000`. One
difference: an answer without tokens is found nowhere (there: everywhere).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

import regex

_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether any of `answers` stands in `text` as a sequence of whole tokens.

    About ten microseconds for a passage of a hundred words that holds none, twice that to be
    sure of one. Raises `ValueError` for a plain text as `answers`: its letters would be looked up.
    """
    if isinstance(answers, str):
        raise ValueError("answers must be a sequence of texts")
    decomposed = unicodedata.normalize("NFD", text)
    folded = decomposed.casefold()
    # Cheap and never wrong: tokens cannot follow each other where one of them is missing.
    likely = [tokens for tokens, parts in map(_answer, answers) if _all_in(parts, folded)]
    if not likely:
        return False
    line = _joined(decomposed)
    return any(tokens in line for tokens in likely)


def _all_in(parts: tuple[str, ...], text: str) -> bool:
    return bool(parts) and all(part in text for part in parts)


@functools.lru_cache(maxsize=65536)
def _answer(answer: str) -> tuple[str, tuple[str, ...]]:
    """Return an answer's tokens in one line, and each casefolded."""
    line = _joined(unicodedata.normalize("NFD", answer))
    return line, tuple(line.casefold().split())


def _joined(decomposed: str) -> str:
    """Return the tokens in lower case between single spaces, which no token contains.

    A sequence of tokens within another is then a text within a text.
    """
    # Token by token: the lower case of a Greek sigma depends on what follows it.
    return " ".join(["", *(token.lower() for token in _TOKEN.findall(decomposed)), ""])
