"""The machine's limit: how fast it multiplies matrices of the LM's shapes, and what a step needs.

Rates are measured, work is counted; their quotient says how much of the machine a run used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoulders.lm.block import multiplied
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.kernels import available
from shoulders.lm.load import load_lm

POSITIONS = 256  # rows of the measured products, about one pack
SECONDS = 0.1  # for each shape and direction


def layer_shapes(lm: FrozenLM) -> list[tuple[int, int]]:
    """Return `(n, k)` of every matrix in the LM's layers; embeddings and head are not in them."""
    outside = {id(p) for p in lm.model.get_input_embeddings().parameters()}
    outside |= {id(p) for p in lm.model.get_output_embeddings().parameters()}
    shapes = []
    for parameter in lm.model.parameters():
        if parameter.dim() == 2 and id(parameter) not in outside:
            shapes.append((parameter.shape[0], parameter.shape[1]))
    return shapes


def step_operations(lm: FrozenLM, positions: int, pairs: int, answers: int) -> float:
    """Return the floating-point operations that a training step must do.

    Forward, and backward to activations: two for every weight and position each way, none for
    the gradients of weights. Attention: scores and reading forwards, twice that backwards.

    Args:
        lm: the frozen LM.
        positions: positions that the LM computes, those of prompts too.
        pairs: (query, key) pairs that attention must look at.
        answers: positions whose logits are needed.
    """
    config = lm.model.config
    weights = sum(n * k for n, k in layer_shapes(lm))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attended = pairs * config.num_attention_heads * width * config.num_hidden_layers
    return float(
        4 * positions * weights + 12 * attended + 4 * answers * lm.vocab_size * lm.hidden_size
    )


def generation_operations(lm: FrozenLM, read: int, written: int) -> float:
    """Return the operations of reading `read` and writing `written` positions, attention aside."""
    weights = sum(n * k for n, k in layer_shapes(lm))
    return float(2 * (read + written) * weights + 2 * written * lm.vocab_size * lm.hidden_size)


def matmul_rates(name: str) -> dict[str, float]:
    """Return operations per second on the LM's own shapes, by type: the median of three rounds.

    Forward products `x W^T` and backward ones `g W` of `POSITIONS` rows, every shape weighted by
    the work it stands for in the LM. Floats are torch's own products; int8 has what an int8 LM is
    multiplied by here, packed weights where the processor has such products.
    """
    shapes = layer_shapes(load_lm(name, dtype="float32"))
    rates = {}
    for kind in ("float32", "bfloat16", "int8"):
        several = [_rate(shapes, kind) for _ in range(3)]
        rates[kind] = sorted(several)[1]
    return rates


def _rate(shapes: Sequence[tuple[int, int]], kind: str) -> float:
    seconds = operations = 0.0
    for n, k in sorted(set(shapes)):
        count = shapes.count((n, k))
        x, w, g = _drawn(POSITIONS, k, kind), _drawn(n, k, kind), _drawn(POSITIONS, n, kind)
        for left, right in ((x, w), (g, w.T)):
            seconds += count * _seconds(product_of(left, right))
            operations += count * 2 * POSITIONS * n * k
    return operations / seconds


def product_of(x: torch.Tensor, weight: torch.Tensor) -> functools.partial[torch.Tensor]:
    """Return what multiplies `x [m, k]` by a weight `[n, k]`, as an LM of their type does."""
    if x.dtype != torch.int8:
        return functools.partial(torch.mm, x, weight.T)
    kernels = available()
    ours = None if kernels is None else kernels.int8
    if ours is None or not ours.fits(weight):
        return functools.partial(multiplied, x, weight.T)
    return functools.partial(ours.product, x, ours.packed(weight))


def _drawn(m: int, n: int, kind: str) -> torch.Tensor:
    if kind == "int8":
        return torch.randint(-127, 128, (m, n), dtype=torch.int8)
    return torch.randn(m, n, dtype=getattr(torch, kind))


def _seconds(run: Callable[[], Any]) -> float:
    run()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - started) / count
