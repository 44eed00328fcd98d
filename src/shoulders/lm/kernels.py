"""Compile and call our C sources; `available()` is None without a C compiler.

The library is built once, in a second or two, and kept in the cache folder under the hash of its
source, flags and processor. Its functions run on one thread each and let other Python threads
run meanwhile. Each has the plain torch functions of `shoulders.lm.block` as its reference.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoulders.errors import ShouldersError
from shoulders.files import atomic_path, cache_folder
from shoulders.lm.address import at, floats
from shoulders.lm.beside import Beside
from shoulders.lm.layer import Rows, Sizes
from shoulders.lm.pairs import Pairs
from shoulders.lm.tiles import Tiles

_FLAGS = (
    *("-O3", "-march=native", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math"),
)
# One after the other, as one.
_SOURCES = (
    "kernels.c",
    "halves.c",
    "products.c",
    "attention.c",
    "tiles.c",
    "pairs.c",
    "layers.c",
)
_WIDE = 32  # the most keys that products.c takes at once
_QUERIES = 6  # of one key/value head, likewise
_POINTERS = {
    "round_rows": 5,
    "rescale": 6,
}


class Kernels:
    """The compiled functions; tensors are contiguous, on the CPU, float32 unless said otherwise.

    Attributes:
        tiles: products in the processor's matrix unit, or None where it has none.
        pairs: products of int8 on AVX2 alone, or None where there is better or less.
    """

    def __init__(self, library: Path) -> None:
        self._c = ctypes.CDLL(str(library))
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        for name, count in _POINTERS.items():
            getattr(self._c, name).argtypes = [pointer] * count + [size] * 2
        self._c.norm_round.argtypes = [
            pointer,
            pointer,
            real,
            pointer,
            pointer,
            pointer,
            size,
            size,
        ]
        self._c.norm_back.argtypes = [*[pointer] * 5, real, *[pointer] * 3, size, size]
        self._c.rotate.argtypes = [pointer, pointer, pointer, real, *[size] * 4]
        self._c.gate_round.argtypes = [pointer, size, *[pointer] * 3, *[size] * 2]
        self._c.gate_back_round.argtypes = [*[pointer] * 4, size, *[pointer] * 6, *[size] * 2]
        if self._c.tiles_ready() or self._c.pairs_ready():
            first: list[Any] = [pointer, size, size, pointer, pointer, size]
            rows: list[Any] = [*[pointer] * 9, size, real, pointer]
            self._c.read_layers.argtypes = [*first, *rows, *[size] * 9]
        self.tiles = Tiles(self._c) if self._c.tiles_ready() else None
        self.pairs = Pairs(self._c) if self._c.pairs_ready() else None
        self._c.likeliest.argtypes = [*[pointer] * 3, size, size]
        self._c.attend.argtypes = [*[pointer] * 9, *[size] * 6]
        self._c.attend_back.argtypes = [*[pointer] * 10, *[size] * 6]

    @property
    def int8(self) -> Tiles | Pairs | None:
        """What multiplies packed int8 weights; None where torch's own product is to be taken."""
        return self.tiles or self.pairs

    def round_rows(self, x: Tensor, channel: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return `[m, n]` int8 levels and `[m]` scales of `x [m, n]`, times `channel [n]`."""
        x = x.contiguous()
        levels, scale, row = _room(x.shape[0], x.shape[1])
        self._c.round_rows(
            at(x), at(channel), at(levels), at(scale), at(row), x.shape[0], x.shape[1]
        )
        return levels, scale

    def norm_round(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return levels and scales of the RMS norm of `x [m, n]`."""
        levels, scale, row = _room(x.shape[0], x.shape[1])
        self._c.norm_round(
            at(x), at(weight), epsilon, at(levels), at(scale), at(row), x.shape[0], x.shape[1]
        )
        return levels, scale

    def rescale(
        self,
        product: Tensor,
        scale: Tensor,
        channel: Tensor | None,
        bias: Tensor | None = None,
        rest: Tensor | None = None,
    ) -> Tensor:
        """Return `product [m, n] int32 * scale [m] * channel [n] + bias [n] + rest [m, n]`."""
        y = floats(*product.shape)
        self._c.rescale(
            *(at(product), at(scale), at(channel), at(bias), at(rest), at(y)), *product.shape
        )
        return y

    def gate_round(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels and scales of `silu(gate) * up`, from `gate_up [m, 2 n]`.

        Here and in `gate_back_round` that may be bfloat16.
        """
        m, n = gate_up.shape[0], gate_up.shape[1] // 2
        levels, scale, row = _room(m, n)
        half = gate_up.dtype == torch.bfloat16
        self._c.gate_round(at(gate_up), half, at(levels), at(scale), at(row), m, n)
        return levels, scale

    def gate_back_round(
        self,
        product: Tensor,
        scale: Tensor,
        gate_up: Tensor,
        channel: Tensor,
        added: Tensor | None = None,
        plain: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return levels and scales of the gradient of `gate_up [m, 2 n]`, times `channel`.

        The gradient of `silu(gate) * up` is `product [m, n] int32 * scale [m] + added [m, n]`.
        With `plain`, float32 or bfloat16, the third result is the gradient of `gate_up` itself.
        """
        m, n = product.shape
        levels, out, row = _room(m, 2 * n)
        half = gate_up.dtype == torch.bfloat16
        itself = None if plain is None else torch.empty(m, 2 * n, dtype=plain)
        both = (None, itself) if plain == torch.bfloat16 else (itself, None)
        self._c.gate_back_round(
            *(at(product), at(scale), at(added), at(gate_up), half, at(channel)),
            *(at(both[0]), at(both[1]), at(levels), at(out), at(row), m, n),
        )
        return levels, out, itself

    def norm_back(
        self,
        product: Tensor,
        scale: Tensor,
        x: Tensor,
        weight: Tensor,
        epsilon: float,
        rest: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Return `rest` plus the gradient of `x [m, n]` through its RMS norm.

        The gradient of the norm's output is `product [m, n] int32 * scale [m] + added [m, n]`.
        """
        y, row = floats(*product.shape), floats(product.shape[1])
        self._c.norm_back(
            *(at(product), at(scale), at(added), at(x), at(weight), epsilon, at(rest)),
            *(at(y), at(row), *product.shape),
        )
        return y

    def rotate(self, qkv: Tensor, rows: Rows, sizes: Sizes, sign: float = 1.0) -> None:
        """Turn queries and keys of `qkv [t, (h + 2 g) e]` by their positions, in place."""
        heads, kv_heads = sizes.heads, sizes.kv_heads
        self._c.rotate(
            *(at(qkv), at(rows.cos), at(rows.sin), sign, len(qkv)),
            *(heads + kv_heads, heads + 2 * kv_heads, sizes.width),
        )

    def likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return where each row of `logits [m, n]` is greatest and its logsumexp, `[m]` each."""
        index, total = torch.empty(len(logits), dtype=torch.long), floats(len(logits))
        self._c.likeliest(at(logits), at(index), at(total), *logits.shape)
        return index, total

    def attend(self, qkv: Tensor, prefix: Tensor, rows: Rows, sizes: Sizes) -> Tensor:
        """Return what every position reads, `[t, h e]`, of rotated `qkv [t, (h + 2 g) e]`."""
        out = floats(len(qkv), sizes.heads * sizes.width)
        b, q = len(rows.start), prefix.shape[2]
        count = queries_together(sizes.heads // sizes.kv_heads)
        room = floats(self.most_seen(rows) * (3 * sizes.width + count))
        self._c.attend(
            *(at(qkv), at(prefix[0]), at(prefix[1]), at(rows.start), at(rows.length)),
            *(at(rows.seen), at(rows.slot), at(out), at(room), b, q, sizes.shared),
            *(sizes.heads, sizes.kv_heads, sizes.width),
        )
        return out

    def attend_back(
        self, gradient: Tensor, qkv: Tensor, prefix: Tensor, rows: Rows, sizes: Sizes
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of rotated `qkv` and of `prefix`, given that of `attend`."""
        g_qkv, g_prefix = torch.empty_like(qkv), torch.empty_like(prefix)
        (b, q), count = prefix.shape[1:3], queries_together(sizes.heads // sizes.kv_heads)
        room = floats(self.most_seen(rows) * (6 * sizes.width + 2 * count))
        self._c.attend_back(
            *(at(qkv), at(prefix[0]), at(prefix[1]), at(rows.start), at(rows.length)),
            *(at(gradient), at(g_qkv), at(g_prefix[0]), at(g_prefix[1]), at(room)),
            *(b, q, sizes.shared, sizes.heads, sizes.kv_heads, sizes.width),
        )
        return g_qkv, g_prefix

    def read_layers(
        self,
        table: Tensor,
        halves: bool,
        x: Tensor,
        values: Tensor,
        places: Tensor,
        rows: Rows,
        beside: Beside,
        epsilon: float,
        room: Tensor,
        *counts: int,
    ) -> None:
        """Read all layers into `x` and a cache's `values`, see `shoulders.lm.layers`."""
        tensors = (places, rows.cos, rows.sin, rows.start, rows.length, rows.seen, rows.slot)
        self._c.read_layers(
            *(at(table), len(table), halves, at(x), at(values), values[0, 0].numel()),
            *(at(tensor) for tensor in (*tensors, beside.table, beside.which)),
            *(beside.rank, epsilon, at(room), *counts),
        )

    def most_seen(self, rows: Rows) -> int:
        """Return the most positions that a row sees, in whole vectors."""
        return -(-rows.mask.shape[3] // _WIDE) * _WIDE


@functools.cache
def available() -> Kernels | None:
    """Return the compiled functions, or None where no compiler is or it fails."""
    compiler = shlex.split(os.environ.get("CC", "")) or _found("cc") or _found("gcc")
    if not compiler or platform.system() == "Windows":
        return None
    folder = files("shoulders.lm")
    source = "".join(folder.joinpath(name).read_text(encoding="utf-8") for name in _SOURCES)
    key = "\n".join((source, *_FLAGS, " ".join(compiler), platform.machine(), _processor_flags()))
    library = cache_folder() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if library.is_file():
        with contextlib.suppress(OSError):  # a damaged file is built again
            return Kernels(library)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(library) as temporary:
            subprocess.run(
                [*compiler, *_FLAGS, "-x", "c", "-", "-o", str(temporary), "-lm"],
                input=source.encode(),
                check=True,
                capture_output=True,
            )
        return Kernels(library)  # OSError: nothing may be executed there
    except (ShouldersError, OSError, subprocess.CalledProcessError):
        return None


def _found(compiler: str) -> list[str]:
    return [path] if (path := shutil.which(compiler)) else []


def _processor_flags() -> str:
    """Return what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def queries_together(group: int) -> int:
    """Return how many queries of one key/value head attend at once: of a position or several."""
    return group * max(1, _QUERIES // group)


def _room(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty(m, n, dtype=torch.int8), floats(m), floats(n)
