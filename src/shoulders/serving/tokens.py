"""Tokens one by one, as OpenAI's log-probabilities name them."""

from __future__ import annotations

import functools
import re

from transformers.convert_slow_tokenizer import bytes_to_unicode

from shoulders.lm.frozen import FrozenLM

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # of vocabularies that fall back to bytes
_BROKEN = "\ufffd"
_SPACE = "\u2581"  # how SentencePiece's vocabularies write one


def token_bytes(lm: FrozenLM, token: int) -> bytes | None:
    """Return what a token stands for; None for a special one, which stands for no text."""
    text = lm.text([token])
    name = str(lm.tokenizer.convert_ids_to_tokens(token))
    if _SPACE in name and token not in lm.tokenizer.all_special_ids:
        return name.replace(_SPACE, " ").encode()  # a text of its own begins without its space
    if not text:
        return None
    if _BROKEN not in text:
        return text.encode()
    # A part of a character: only the vocabulary knows which.
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    known = _bytes_of_letters()
    return bytes(known[c] for c in name) if all(c in known for c in name) else text.encode()


def token_name(lm: FrozenLM, token: int) -> str:
    """Return a token's text; a name of its own for a special one, and for a part of a character."""
    own = token_bytes(lm, token)
    if own is None:
        return str(lm.tokenizer.convert_ids_to_tokens(token))
    try:
        return own.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{one:02x}" for one in own)


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """Return the bytes that byte-level vocabularies write as letters."""
    return {letter: byte for byte, letter in bytes_to_unicode().items()}
