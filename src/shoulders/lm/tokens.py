"""Texts and token ids of one LM."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any


class Tokens:
    """A Hugging Face tokenizer, asked by one thread at a time.

    A fast tokenizer keeps in itself how it is asked: another thread must not change that.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._asking = threading.Lock()

    def of(self, texts: Sequence[str], *, markup: bool = False) -> list[list[int]]:
        """Return token ids of each text; no special tokens are added.

        What reads like a special token (`<|im_end|>`) is plain text, as users' inputs must be,
        unless `markup` is set: for a chat template's own frame.
        """
        if not texts:
            return []
        with self._asking:
            ids: list[list[int]] = self._tokenizer(
                list(texts),
                add_special_tokens=False,
                split_special_tokens=not markup,
                return_attention_mask=False,
                verbose=False,
            )["input_ids"]
        return ids

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens are left out, spaces kept as they are."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def starts(self) -> tuple[int, ...]:
        """Return the token ids that every text begins with, as the tokenizer has it.

        Llama's, Mistral's and Gemma's put `<s>` there, SmolLM2's and Qwen's nothing; LMs that were
        taught with it answer far worse without.
        """
        with self._asking:
            whole: list[int] = self._tokenizer("a")["input_ids"]
        (plain,) = self.of(["a"])
        width = len(plain)
        found = (k for k in range(len(whole)) if whole[k : k + width] == plain)
        return tuple(whole[: next(found, 0)])

    def ends(self, generation_config: Any) -> tuple[int, ...]:
        """Return the token ids that end an answer: the tokenizer's, then a model's own."""
        configured = getattr(generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        ids = [self._tokenizer.eos_token_id, *several]
        return tuple(dict.fromkeys(i for i in ids if i is not None))
