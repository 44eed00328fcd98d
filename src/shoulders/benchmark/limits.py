"""The machine's limit: how fast it multiplies matrices of the LM's shapes, and what a step needs.

Rates are measured, work is counted; their quotient says how much of the machine a run used.
`python -m shoulders.benchmark.limits` measures once: it takes its turn among the contenders, so
that a slow minute of the machine hits the limit as it hits them.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoulders.benchmark.contender import Contender, median
from shoulders.lm.block import multiplied
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.kernels import available
from shoulders.lm.load import load_lm
from shoulders.lm.shard import decoder_layers

POSITIONS = 256  # rows of the measured products, about one pack
SECONDS = 0.1  # for each shape and direction
TYPES = ("float32", "bfloat16", "int8")
LIMIT = "limit"  # its name among the contenders


def main() -> None:
    """Print the rates of one measurement as a JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--lm", required=True)
    sys.stdout.write(json.dumps(matmul_rates(parser.parse_args().lm)) + "\n")


def limit_of(lm: str) -> Contender:
    """Return what measures the machine's rates on an LM's shapes once."""
    return Contender(LIMIT, [sys.executable, "-m", "shoulders.benchmark.limits", "--lm", lm])


def limits(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return the median of each rate over runs, and all of them, as a result has them."""
    return {
        "limit_operations_per_s": {kind: median(runs, kind) for kind in TYPES},
        "limit_samples": {kind: [run[kind] for run in runs] for kind in TYPES},
    }


def floating(rates: dict[str, float]) -> float:
    """Return the limit that shares are of: the faster floating-point rate."""
    return max(rates["float32"], rates["bfloat16"])


def layer_shapes(lm: FrozenLM) -> list[tuple[int, int]]:
    """Return `(n, k)` of every matrix in the LM's layers; tables and head are outside them."""
    parameters = decoder_layers(lm.model).parameters()
    return [(p.shape[0], p.shape[1]) for p in parameters if p.dim() == 2]


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


def generation_operations(lm: FrozenLM, rows: int, read: int, written: int) -> float:
    """Return the operations of reading and writing so many positions in all, attention aside.

    A row's last token is chosen and never read.
    """
    weights = sum(n * k for n, k in layer_shapes(lm))
    positions = read + written - rows
    return float(2 * positions * weights + 2 * written * lm.vocab_size * lm.hidden_size)


def matmul_rates(name: str) -> dict[str, float]:
    """Return operations per second on the LM's own shapes, by type.

    Forward products `x W^T` and backward ones `g W` of `POSITIONS` rows, every shape weighted by
    the work it stands for in the LM. Floats are torch's own products; int8 has what an int8 LM is
    multiplied by here, packed weights where the processor has such products.
    """
    shapes = layer_shapes(load_lm(name, dtype="float32"))
    return {kind: _rate(shapes, kind) for kind in TYPES}


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


if __name__ == "__main__":
    main()
