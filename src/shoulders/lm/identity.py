"""Which LM this is, byte by byte: its tensors in order, and the hash that skills are bound to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from shoulders.fingerprint import identity, tokenizer_digest
from shoulders.lm.lent import held_tensors, stored
from shoulders.lm.shard import whole


def lm_fingerprint(model: Any, tokenizer: Any) -> str:
    """Return the hash of weights and tokenizer, whatever precision the weights are held in."""
    parts = identity(lm_tensors(model)), tokenizer_digest(tokenizer)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def lm_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of every parameter and buffer, tied ones once.

    One at a time: what is sharded or offloaded is fetched when its turn comes.
    """
    for name, module, tensor in held_tensors(model):
        for part, plain in stored(name, module, tensor):
            yield part, whole(plain)
