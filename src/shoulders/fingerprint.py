"""Hashes of weights and tokenizers: what a skill is bound to, and proof that nothing moved."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Tensors taken before the oldest is done: those of a sharded LM are gathered as they are taken, and
# must not stand in memory all at once.
AHEAD = 4


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and every byte of `tensors`.

    Two models have equal digests only when they are bit-identical (promise 1, "frozen").
    """
    return _combine(tensors, cast=None)


def identity(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the SHA-256 over `tensors` rounded to bfloat16.

    The same weights loaded as float32 or as bfloat16 are the same LM to a skill, so the
    identity must not depend on the precision they were loaded in (and is half the bytes).
    """
    import torch

    return _combine(tensors, cast=torch.bfloat16)


def tokenizer_digest(tokenizer: Any) -> str:
    """Return the SHA-256 over the tokenizer's vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are call-time settings stored in the same JSON: left out.
        backend = type(backend).from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
        rules = backend.to_str()
    else:
        rules = repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(rules.encode()).hexdigest()


def _combine(tensors: Iterable[tuple[str, torch.Tensor]], cast: torch.dtype | None) -> str:
    import torch

    def one(item: tuple[str, torch.Tensor]) -> str:
        name, tensor = item
        tensor = tensor.detach()
        if cast is not None and tensor.is_floating_point():
            tensor = tensor.to(cast)
        data = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        bytes_hash = hashlib.sha256(memoryview(data)).hexdigest()  # type: ignore[arg-type]
        return f"{name} {tensor.dtype} {tuple(tensor.shape)} {bytes_hash}"

    # hashlib releases the interpreter lock: two cores hash twice as fast.
    lines, waiting = [], deque[Future[str]]()
    with ThreadPoolExecutor() as pool:
        for item in tensors:
            waiting.append(pool.submit(one, item))
            if len(waiting) > AHEAD:
                lines.append(waiting.popleft().result())
        lines += [future.result() for future in waiting]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
