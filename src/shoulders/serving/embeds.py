"""What vLLM is given of an input: `[prompt ; token embeddings]`, or a prefix and token ids.

Made by the gateway alone; clients send text.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from shoulders.errors import ShouldersError, WindowError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt

PREFIX = "shoulders_prefix"  # its name in a request; shoulders.serving.prefix_connector reads it
PLACEHOLDER = 0  # the token that stands where keys/values are loaded; never read


@dataclass(frozen=True, slots=True)
class Encoded:
    """An input as vLLM reads it.

    Attributes:
        fields: of the body of a request for completions.
        positions: of the window that it takes.
    """

    fields: dict[str, Any]
    positions: int


def encoded(lm: FrozenLM, prompt: Prompt, ids: Sequence[int], window: int) -> Encoded:
    """Return one row's prompt and tokens for vLLM.

    Args:
        lm: whose embedding table is read.
        prompt: of one row: vectors, keys/values, or nothing.
        ids: the input's tokens, at least one.
        window: most positions that the vLLM server takes, of input and answer.

    Raises:
        WindowError: there is no token, or no room for an answer.
        ShouldersError: the prompt is not finite, or of another LM's width.
    """
    positions = int(prompt.lengths()[0]) + len(ids)
    if not ids:
        raise WindowError("the input has no tokens")
    if positions >= window:
        raise WindowError(
            f"the input takes {positions} positions with its prompt, the vLLM server's window has "
            f"{window} (its --max-model-len); shorten it, or allow truncation"
        )
    vectors = prompt.vectors[0, prompt.vector_mask[0]]
    prefix = prompt.keys_values[:, ..., prompt.keys_values_mask[0], :]
    if prefix.shape[4]:
        if len(vectors):
            raise ShouldersError("a prompt of vectors and keys/values at once is not sent to vLLM")
        return Encoded(_behind_prefix(prefix[0], ids), positions)
    if not len(vectors):
        return Encoded({"prompt": list(ids)}, positions)
    table = lm.embed_rows([ids])
    if vectors.shape[1] != table.shape[1]:
        raise ShouldersError(
            f"the prompt's vectors have {vectors.shape[1]} dimensions, the LM's embeddings "
            f"{table.shape[1]}"
        )
    return Encoded({"prompt_embeds": _tensor(torch.cat([vectors.to(table), table]))}, positions)


def _tensor(embeddings: Tensor) -> str:
    """Return embeddings `[s, d]` as vLLM takes them: base64 of a tensor that `torch.save` wrote.

    The one place where that format is written: vLLM reads no other (with `weights_only`). Nothing
    that a client sends is ever read as one.
    """
    _check_finite(embeddings)
    buffer = io.BytesIO()
    torch.save(embeddings.detach().cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _behind_prefix(prefix: Tensor, ids: Sequence[int]) -> dict[str, Any]:
    """Return ids behind placeholders, with the keys/values `[layers, 2, heads, q, e]` for them.

    The salt keeps vLLM's prefix cache from taking placeholders of one prefix for another's.
    """
    _check_finite(prefix)
    data = save({"prefix": prefix.detach().cpu().contiguous()})
    length = prefix.shape[3]
    return {
        "prompt": [PLACEHOLDER] * length + list(ids),
        "cache_salt": hashlib.sha256(data).hexdigest(),
        "kv_transfer_params": {PREFIX: base64.b64encode(data).decode("ascii"), "length": length},
    }


def _check_finite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ShouldersError("the prompt that the skill writes for this input is not finite")
