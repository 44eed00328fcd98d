"""Answers as OpenAI's clients read them: completions, chat completions, and their streams."""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Sequence
from typing import Any

from shoulders.lm.decode import Completion
from shoulders.lm.frozen import FrozenLM
from shoulders.serving.tokens import token_bytes, token_name


def completion_reply(
    lm: FrozenLM, frame: dict[str, Any], found: Sequence[Completion], *, top: int | None
) -> dict[str, Any]:
    """Return a whole answer of `/v1/completions`; None of `top` is without log-probabilities."""
    choices = [
        {
            "index": i,
            "text": c.text,
            "finish_reason": c.finish,
            "logprobs": None if top is None else completion_logprobs(lm, c, top),
        }
        for i, c in enumerate(found)
    ]
    return {**frame, "object": "text_completion", "choices": choices}


def chat_reply(
    lm: FrozenLM, frame: dict[str, Any], found: Sequence[Completion], *, top: int | None
) -> dict[str, Any]:
    """Return a whole answer of `/v1/chat/completions`; `top` as above."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": c.text},
            "finish_reason": c.finish,
            "logprobs": None if top is None else chat_logprobs(lm, c, top),
        }
        for i, c in enumerate(found)
    ]
    return {**frame, "object": "chat.completion", "choices": choices}


def completion_logprobs(lm: FrozenLM, completion: Completion, most: int) -> dict[str, Any]:
    """Return what `logprobs` is in a completion, with at most so many alternatives a token.

    Offsets are those in the text that was answered: what was taken off its front lies at 0, and
    all tokens of one character where it does.
    """
    text, decoder, begins = "", codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in completion.token_ids:
        begins.append(len(text))
        text += decoder.decode(token_bytes(lm, token) or b"")
    ahead = max(0, (text + decoder.decode(b"", final=True)).find(completion.text))
    both = zip(completion.token_ids, completion.logprobs, completion.top, strict=True)
    return {
        "tokens": [token_name(lm, i) for i in completion.token_ids],
        "token_logprobs": list(completion.logprobs),
        "top_logprobs": [
            {token_name(lm, i): value for i, value in dict([*top[:most], (token, own)]).items()}
            for token, own, top in both
        ],
        "text_offset": [max(0, begin - ahead) for begin in begins],
    }


def chat_logprobs(lm: FrozenLM, completion: Completion, most: int) -> dict[str, Any]:
    """Return what `logprobs` is in a chat completion, with at most so many alternatives a token."""

    def entry(token: int, value: float) -> dict[str, Any]:
        own = token_bytes(lm, token)
        named = token_name(lm, token)
        return {"token": named, "logprob": value, "bytes": None if own is None else list(own)}

    both = zip(completion.token_ids, completion.logprobs, completion.top, strict=True)
    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*one) for one in top[:most]]}
            for token, value, top in both
        ]
    }


def usage(prompt_tokens: int, found: Sequence[Completion]) -> dict[str, int]:
    """Return the token counts of an answer."""
    new = sum(len(c.token_ids) for c in found)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }


def frame_of(kind: str, request_id: str, model: str) -> dict[str, Any]:
    """Return what every answer begins with."""
    return {"id": f"{kind}-{request_id}", "created": int(time.time()), "model": model}


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    # In ASCII: some clients end lines at U+2028 and U+0085 as well.
    return f"data: {json.dumps(value)}\n\n"


def error_body(message: str, kind: str, code: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
