"""Call `tiles.c` and `halves.c`: products in AMX tiles, of int8 and of bfloat16, and what bfloat16
layers do between them.

Weights are packed once. A row of a result depends on that row alone, to the last bit.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from shoulders.lm.address import at, floats

# As in tiles.c: columns of a panel, bytes of a tile's row, rows of the head at a time, bytes of
# sums that wait.
PANEL, BYTES, GROUP, WITHIN = 32, 64, 64, 1 << 18


def fits_tiles(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether a weight `[n, k]` and its transpose can be packed, as int8 or bfloat16.

    Args:
        weight: any tensor.
        dtype: in which it would be packed; default: its own.
    """
    deep = BYTES // (dtype or weight.dtype).itemsize
    return weight.dim() == 2 and all(s % deep == 0 == s % PANEL for s in weight.shape)


def packed(weight: Tensor) -> Tensor:
    """Return weights `[n, k]`, int8 or bfloat16, laid out for tiles: `[n / 32, ...]`.

    A tile's row holds four (int8) or two (bfloat16) neighbours in `k` of 16 columns.
    """
    (n, k), beside = weight.shape, 4 // weight.element_size()
    panels = weight.reshape(n // PANEL, 2, 16, k // (16 * beside), 16, beside)
    return panels.permute(0, 3, 1, 4, 2, 5).contiguous()


class Tiles:
    """The compiled functions; tensors are contiguous, float32 unless said otherwise."""

    fits, packed = staticmethod(fits_tiles), staticmethod(packed)

    def __init__(self, library: ctypes.CDLL) -> None:
        self._c = library
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        several = [pointer] * 5
        library.tile_product.argtypes = [
            pointer,
            pointer,
            size,
            *several,
            size,
            pointer,
            *[size] * 3,
        ]
        library.split_product.argtypes = [*[pointer] * 4, *[size] * 3]
        library.head_losses.argtypes = [*[pointer] * 8, *[size] * 3]
        library.norm_half.argtypes = [pointer, pointer, real, pointer, *[size] * 2]
        library.gate_half.argtypes = [*[pointer] * 2, *[size] * 2]
        library.gate_back_half.argtypes = [*[pointer] * 3, *[size] * 2]
        library.norm_back_float.argtypes = [*[pointer] * 3, real, *[pointer] * 2, *[size] * 2]

    def product(
        self,
        x: Tensor,
        weights: Tensor,
        scale: Tensor | None = None,
        channel: Tensor | None = None,
        bias: Tensor | None = None,
        rest: Tensor | None = None,
        *,
        half: bool = False,
    ) -> Tensor:
        """Return `x [m, k]` times packed weights `[n, k]`, plus `bias [n]` and `rest [m, n]`.

        int8: `[m, n]` int32; with `scale [m]` float32, as `Kernels.rescale` makes it of them.
        bfloat16: float32. With `half` that is rounded to bfloat16.
        """
        m, n = len(x), len(weights) * PANEL
        floats = x.dtype == torch.bfloat16
        plain = torch.float32 if floats or scale is not None else torch.int32
        y = torch.empty(m, n, dtype=torch.bfloat16 if half else plain)
        deep = x.shape[1] * x.element_size()
        room = torch.empty(PANEL * deep + WITHIN, dtype=torch.int8)
        self._c.tile_product(
            *(at(x), at(weights), floats, at(scale), at(channel), at(bias), at(rest)),
            *(at(y), half, at(room), m, n, deep),
        )
        return y

    def wide_product(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return `x [m, k]` times packed bfloat16 weights `[n, k]`, with 16 bits of each `x`."""
        (m, k), n = x.shape, len(weights) * PANEL
        y, room = floats(m, n), _split_room(m, k)
        self._c.split_product(at(x), at(weights), at(y), at(room), m, n, k)
        return y

    def head_losses(
        self, states: Tensor, weights: Tensor, back: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return losses `[m]` of `targets [m]` and, with `back`, their gradients `[m, k]`.

        The head's bfloat16 weights `[n, k]` are packed, and so is their transpose, `back`.
        """
        (m, k), n = states.shape, len(weights) * PANEL
        losses, gradient = floats(m), None if back is None else floats(m, k)
        logits, room = floats(min(m, GROUP), n), _split_room(min(m, GROUP), max(n, k))
        self._c.head_losses(
            *(at(states), at(weights), at(back), at(targets), at(losses)),
            *(at(gradient), at(logits), at(room), m, n, k),
        )
        return losses, gradient

    def norm_half(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Return the RMS norm of `x [m, n]` in bfloat16."""
        y = torch.empty(x.shape, dtype=torch.bfloat16)
        self._c.norm_half(at(x), at(weight), epsilon, at(y), *x.shape)
        return y

    def gate_half(self, gate_up: Tensor) -> Tensor:
        """Return `silu(gate) * up [m, n]` of `gate_up [m, 2 n]`, both bfloat16."""
        m, n = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty(m, n, dtype=torch.bfloat16)
        self._c.gate_half(at(gate_up), at(y), m, n)
        return y

    def gate_back_half(self, gradient: Tensor, gate_up: Tensor) -> Tensor:
        """Return the gradient of `gate_up`, in bfloat16, given that of `gate_half`, `[m, n]`."""
        y = torch.empty(gate_up.shape, dtype=torch.bfloat16)
        self._c.gate_back_half(at(gradient), at(gate_up), at(y), *gradient.shape)
        return y

    def norm_back(
        self, gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float, rest: Tensor
    ) -> Tensor:
        """Return `rest` plus the gradient of `x [m, n]`, given that of its RMS norm."""
        y = floats(*x.shape)
        self._c.norm_back_float(
            *(at(gradient), at(x), at(weight), epsilon, at(rest), at(y), *x.shape)
        )
        return y


def _split_room(m: int, k: int) -> Tensor:
    """Return room for both halves of `m` rows, in whole panels, each a little longer than `k`."""
    return torch.empty(2 * -(-m // PANEL) * PANEL * (k + PANEL), dtype=torch.bfloat16)
