"""Answers as OpenAI's clients read them: completions, chat completions, and their streams."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from shoulders.lm.decode import Completion
from shoulders.lm.frozen import FrozenLM


def completion_reply(
    lm: FrozenLM, frame: dict[str, Any], found: Sequence[Completion], *, logprobs: bool
) -> dict[str, Any]:
    """Return a whole answer of `/v1/completions`."""
    choices = [
        {
            "index": i,
            "text": c.text,
            "finish_reason": c.finish,
            "logprobs": completion_logprobs(lm, c) if logprobs else None,
        }
        for i, c in enumerate(found)
    ]
    return {**frame, "object": "text_completion", "choices": choices}


def chat_reply(
    lm: FrozenLM, frame: dict[str, Any], found: Sequence[Completion], *, logprobs: bool
) -> dict[str, Any]:
    """Return a whole answer of `/v1/chat/completions`."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": c.text},
            "finish_reason": c.finish,
            "logprobs": chat_logprobs(lm, c) if logprobs else None,
        }
        for i, c in enumerate(found)
    ]
    return {**frame, "object": "chat.completion", "choices": choices}


def completion_logprobs(lm: FrozenLM, completion: Completion) -> dict[str, Any]:
    """Return what `logprobs` is in a completion."""
    tokens = [lm.text([i]) for i in completion.token_ids]
    offsets, at = [], 0
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": list(completion.logprobs),
        "top_logprobs": [{lm.text([i]): value for i, value in top} for top in completion.top],
        "text_offset": offsets,
    }


def chat_logprobs(lm: FrozenLM, completion: Completion) -> dict[str, Any]:
    """Return what `logprobs` is in a chat completion."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text = lm.text([token])
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    both = zip(completion.token_ids, completion.logprobs, completion.top, strict=True)
    return {
        "content": [
            {**entry(token, value), "top_logprobs": [entry(*one) for one in top]}
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
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(message: str, kind: str, code: int) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
