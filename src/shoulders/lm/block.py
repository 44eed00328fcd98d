"""One Llama-style decoder layer over packed rows, forwards and backwards, as plain functions.

The weights are frozen, so the backward pass needs no product for them: only the gradient that
goes on to the layer below and to the prefix's keys/values. Written out by hand, both directions
are functions without autograd in them, the reference of `shoulders.lm.block8`.

Shapes: `t` packed positions of width `d`; `b` rows of at most `s` positions; `c` positions
before them that a row also sees (its prefix, then a shared prompt's own positions); `h` query
heads and `g` key/value heads of width `e`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_LEVELS = 127
_SMALLEST = 1e-30
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Matrix(NamedTuple):
    """A frozen weight `[n, k]`: floating point, or int8 with `scale` `[n]`."""

    values: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Layer(NamedTuple):
    """What one layer computes with; `qkv` and `gate_up` are several matrices in one."""

    attention_norm: Tensor
    qkv: Matrix
    output: Matrix
    feed_norm: Tensor
    gate_up: Matrix
    down: Matrix


class Rows(NamedTuple):
    """Where the rows of a pack lie; the same for every layer.

    Attributes:
        cos, sin: `[t, 1, e / 2]` rotary tables of every position.
        spread: `[b * s]`, packed position of every padded place (any position for a pad).
        packed: `[t]`, padded place of every packed position.
        mask: `[b, 1, s, c + s]`, 0 where a key is seen, the dtype's minimum elsewhere.
        start, length: `[b]`, packed position where each row begins, and how many it has.
        seen, slot: `[b]`, where the prefix is a cache with room to spare: how many of its
            positions each row sees, and which of its rows is theirs; else None.
    """

    cos: Tensor
    sin: Tensor
    spread: Tensor
    packed: Tensor
    mask: Tensor
    start: Tensor
    length: Tensor
    seen: Tensor | None = None
    slot: Tensor | None = None


class Sizes(NamedTuple):
    """Constants of a layer: heads, key/value heads, head width, norm epsilon, shared positions."""

    heads: int
    kv_heads: int
    width: int
    epsilon: float
    shared: int


class Saved(NamedTuple):
    """What `backward` needs of a layer's `forward`."""

    x: Tensor
    middle: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    attended: Tensor
    logsumexp: Tensor
    gate_up: Tensor


def forward(
    x: Tensor, prefix: Tensor, layer: Layer, rows: Rows, sizes: Sizes
) -> tuple[Tensor, Tensor, Saved]:
    """Map `x [t, d]` to the layer's output `[t, d]`.

    `prefix` is `[2, b, q, g, e]`: keys (rotated) and values before each row, `q` may be 0. The
    second result is `[t, (h + 2 g) e]`: rotated queries and keys, and values.
    """
    qkv = turned(times(norm(x, layer.attention_norm, sizes.epsilon), layer.qkv), rows, sizes)
    attended = attend(qkv, prefix, rows, sizes)
    middle = x + times(attended.out, layer.output)
    y, gate_up = feed(middle, layer, sizes.epsilon)
    return y, qkv, Saved(x, middle, *attended.saved, gate_up)


def backward(
    gradient: Tensor, tensors: Sequence[Tensor], layer: Layer, rows: Rows, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x [t, d]` and of `prefix [2, b, q, g, e]`."""
    saved = Saved(*tensors)
    g_middle = feed_back(gradient, saved.middle, saved.gate_up, layer, sizes.epsilon)
    g_qkv, g_prefix = attend_back(times_back(g_middle, layer.output), saved, rows, sizes)
    g_qkv = turned(g_qkv, rows, sizes, back=True)
    g_x = g_middle + norm_back(
        times_back(g_qkv, layer.qkv), saved.x, layer.attention_norm, sizes.epsilon
    )
    return g_x, g_prefix


def feed(middle: Tensor, layer: Layer, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return `middle [t, d]` plus its feed-forward part, and the gates' inputs `[t, 2 f]`."""
    gate_up = times(norm(middle, layer.feed_norm, epsilon), layer.gate_up)
    gate, up = gate_up.chunk(2, -1)
    return middle + times(torch.nn.functional.silu(gate) * up, layer.down), gate_up


def feed_back(
    gradient: Tensor, middle: Tensor, gate_up: Tensor, layer: Layer, epsilon: float
) -> Tensor:
    """Return the gradient of `middle`, given that of what `feed` returned first."""
    gate, up = gate_up.chunk(2, -1)
    through = times_back(gradient, layer.down)
    sigmoid = torch.sigmoid(gate)
    g_gate = through * up * sigmoid * (1 + gate * (1 - sigmoid))
    g_gate_up = torch.cat([g_gate, through * gate * sigmoid], -1)
    return gradient + norm_back(
        times_back(g_gate_up, layer.gate_up), middle, layer.feed_norm, epsilon
    )


class Attended(NamedTuple):
    """What the rows read: `out [t, h * e]`, and what `attend_back` needs (see `Saved`)."""

    out: Tensor
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def attend(qkv: Tensor, prefix: Tensor, rows: Rows, sizes: Sizes) -> Attended:
    """Let every row attend to its prefix and itself: rotated `qkv [t, (h + 2 g) e]`."""
    h, g, e = sizes.heads, sizes.kv_heads, sizes.width
    b = rows.mask.shape[0]
    if rows.slot is not None:
        prefix = prefix[:, rows.slot, : rows.mask.shape[3] - rows.mask.shape[2]]
    qkv = qkv.view(-1, h + 2 * g, e)
    queries = qkv[:, :h][rows.spread].view(b, -1, h, e).transpose(1, 2)
    keys = _before(prefix[0], qkv[:, h : h + g], rows, sizes)
    values = _before(prefix[1], qkv[:, h + g :], rows, sizes)
    attended, logsumexp = _attend(queries, keys, values, 0.0, False, attn_mask=rows.mask)
    out = attended.transpose(1, 2).reshape(-1, h * e)[rows.packed]
    return Attended(out, (queries, keys, values, attended, logsumexp))


def attend_back(gradient: Tensor, saved: Saved, rows: Rows, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Return the gradients of rotated `qkv` and `prefix`, given that of `out [t, h * e]`."""
    h, e = sizes.heads, sizes.width
    b = rows.mask.shape[0]
    # A pad's place reads some real position's gradient: its own must be nothing.
    g_out = _padded(gradient.view(-1, h, e), rows)
    g_queries, g_keys, g_values = _attend_back(
        g_out.view(b, -1, h, e).transpose(1, 2),
        *(saved.queries, saved.keys, saved.values, saved.attended, saved.logsumexp),
        0.0,
        False,
        attn_mask=rows.mask,
    )
    g_q = g_queries.transpose(1, 2).reshape(-1, h, e)[rows.packed]
    g_k, g_prefix_k = _before_back(g_keys, rows, sizes)
    g_v, g_prefix_v = _before_back(g_values, rows, sizes)
    g_qkv = torch.cat([g_q, g_k, g_v], 1).flatten(1)
    return g_qkv, torch.stack([g_prefix_k, g_prefix_v])


def times(x: Tensor, matrix: Matrix) -> Tensor:
    """Return `x W^T + bias`, `[t, k] -> [t, n]`."""
    if matrix.scale is None:
        y = x @ matrix.values.T
    else:
        levels, row_scale = rounded(x)
        product = multiplied(levels, matrix.values.T).float()
        y = (product * row_scale * matrix.scale).to(x.dtype)
    return y if matrix.bias is None else y + matrix.bias


def times_back(gradient: Tensor, matrix: Matrix) -> Tensor:
    """Return the gradient of `x`, `[t, n] -> [t, k]`."""
    if matrix.scale is None:
        return gradient @ matrix.values
    levels, row_scale = rounded(gradient * matrix.scale)
    return (multiplied(levels, matrix.values).float() * row_scale).to(gradient.dtype)


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return the int32 product of two int8 matrices.

    Without instructions for it torch multiplies int8 element by element, a hundred times slower
    than float32: then float32 does it, exactly up to sums of 2^24 and to one part in 2^24 beyond.
    """
    if has_int8():
        return torch._int_mm(left, right)
    return (left.float() @ right.float()).to(torch.int32)


@functools.cache
def has_int8() -> bool:
    """Tell whether this processor multiplies int8 faster than float32 (VNNI or AMX)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_vnni") or capabilities.get("amx_int8"))


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return `[m, k]` int8 levels and `[m, 1]` float32 scales, with `levels * scale ~ x`.

    Symmetric and per row; the error is at most half a scale, which is the row's largest
    magnitude / 127.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _LEVELS).clamp_min(_SMALLEST)
    return (x / scale).round().to(torch.int8), scale


def turned(qkv: Tensor, rows: Rows, sizes: Sizes, *, back: bool = False) -> Tensor:
    """Turn queries and keys of `qkv [t, (h + 2 g) e]` by their positions' angles, or back.

    RoPE, arXiv 2104.09864, with the two halves of a head as the pairs.
    """
    heads = sizes.heads + sizes.kv_heads
    qkv = qkv.view(len(qkv), -1, sizes.width)
    first, second = qkv[:, :heads].chunk(2, -1)
    sin = -rows.sin if back else rows.sin
    parts = [first * rows.cos - second * sin, second * rows.cos + first * sin]
    return torch.cat([torch.cat(parts, -1), qkv[:, heads:]], 1).flatten(1)


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm, in float32 inside as transformers does."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * (wide * inverse).to(x.dtype)


def norm_back(gradient: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Return the gradient of `x`, given that of `norm(x, weight, epsilon)`."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    weighted, normal = gradient.float() * weight, wide * inverse
    through = weighted - normal * (weighted * normal).mean(-1, keepdim=True)
    return (inverse * through).to(x.dtype)


def _before(prefix: Tensor, own: Tensor, rows: Rows, sizes: Sizes) -> Tensor:
    """Return `[b, h, c + s, e]`: prefix, shared positions, then each row's own, per query head."""
    b = rows.mask.shape[0]
    parts = [prefix, own[rows.spread].view(b, -1, *own.shape[1:])]
    if sizes.shared:
        parts.insert(1, own[: sizes.shared].expand(b, -1, -1, -1))
    joined = torch.cat(parts, 1).transpose(1, 2)
    return joined.repeat_interleave(sizes.heads // sizes.kv_heads, 1)


def _before_back(gradient: Tensor, rows: Rows, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Undo `_before`: gradients of `own [t, g, e]` and of `prefix [b, q, g, e]`."""
    b, s = rows.mask.shape[0], rows.mask.shape[2]
    group = sizes.heads // sizes.kv_heads
    summed = gradient.reshape(b, sizes.kv_heads, group, -1, sizes.width).sum(2).transpose(1, 2)
    q = summed.shape[1] - s - sizes.shared
    own = summed[:, q + sizes.shared :].reshape(b * s, sizes.kv_heads, sizes.width)[rows.packed]
    if sizes.shared:
        several = summed[:, q : q + sizes.shared].sum(0)
        own = torch.cat([own[: sizes.shared] + several, own[sizes.shared :]])
    return own, summed[:, :q]


def _padded(x: Tensor, rows: Rows) -> Tensor:
    """Spread `[t, ...]` over the padded places, zeros at pads: `[b * s, ...]`."""
    places = x.new_zeros(len(rows.spread), *x.shape[1:])
    places[rows.packed] = x
    return places
