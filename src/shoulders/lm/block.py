"""One Llama-style decoder layer over packed rows, forwards and backwards, as plain functions.

The weights are frozen, so the backward pass needs no product for them: only the gradient that
goes on to the layer below and to the prefix's keys/values. Written out by hand, both directions
are functions without autograd in them, the reference of `shoulders.lm.block8`.

Shapes are those of `shoulders.lm.layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoulders.lm.inside import DOWN, GATE_UP, OUTPUT, QKV, Inside, Work
from shoulders.lm.layer import Layer, Matrix, Rows, Sizes
from shoulders.lm.processor import has_int8

_LEVELS = 127
_SMALLEST = 1e-30
_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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


def forward(x: Tensor, prefix: Tensor, work: Work) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Map `x [t, d]` to the layer's output `[t, d]`.

    `prefix` is `[2, b, q, g, e]`: keys (rotated) and values before each row, `q` may be 0. The
    second result is `[t, (h + 2 g) e]`: rotated queries and keys, and values; the third what
    `backward` needs.
    """
    layer, rows, sizes, inside = work
    normed = norm(x, layer.attention_norm, sizes.epsilon)
    qkv = times(normed, layer.qkv)
    kept = [inside.add(QKV, normed, qkv)] if inside else []
    qkv = turned(qkv, rows, sizes)
    attended = attend(qkv, prefix, rows, sizes)
    middle = x + times(attended.out, layer.output)
    if inside:
        kept.append(inside.add(OUTPUT, attended.out, middle))
    y, gate_up = feed(middle, layer, sizes.epsilon, inside, kept, Products())
    return y, qkv, (*Saved(x, middle, *attended.saved, gate_up), *kept)


def backward(gradient: Tensor, tensors: Sequence[Tensor], work: Work) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x [t, d]` and `prefix [2, b, q, g, e]`; factors note their own."""
    layer, rows, sizes, inside = work
    saved, kept = Saved(*tensors[: len(Saved._fields)]), tensors[len(Saved._fields) :]
    read = saved.middle, saved.gate_up
    g_middle = feed_back(gradient, *read, layer, sizes.epsilon, inside, kept, Products())
    g_read = times_back(g_middle, layer.output)
    if inside:
        g_read = g_read + inside.back(OUTPUT, kept[OUTPUT], g_middle)
    g_qkv, g_prefix = attend_back(g_read, saved, rows, sizes)
    g_qkv = turned(g_qkv, rows, sizes, back=True)
    through = times_back(g_qkv, layer.qkv)
    if inside:
        through = through + inside.back(QKV, kept[QKV], g_qkv)
    g_x = g_middle + norm_back(through, saved.x, layer.attention_norm, sizes.epsilon)
    return g_x, g_prefix


def feed(
    middle: Tensor,
    layer: Layer,
    epsilon: float,
    inside: Inside | None,
    kept: list[Tensor],
    by: Products,
) -> tuple[Tensor, Tensor]:
    """Return `middle [t, d]` plus its feed-forward part, and the gates' inputs `[t, 2 f]`.

    With factors `kept` grows by what they have read.
    """
    normed = norm(middle, layer.feed_norm, epsilon)
    gate_up = by.times(normed, layer.gate_up)
    if inside:
        kept.append(inside.add(GATE_UP, normed, gate_up))
    gate, up = gate_up.chunk(2, -1)
    gated = torch.nn.functional.silu(gate) * up
    y = middle + by.times(gated, layer.down)
    if inside:
        kept.append(inside.add(DOWN, gated, y))
    return y, gate_up


def feed_back(
    gradient: Tensor,
    middle: Tensor,
    gate_up: Tensor,
    layer: Layer,
    epsilon: float,
    inside: Inside | None,
    kept: Sequence[Tensor],
    by: Products,
) -> Tensor:
    """Return the gradient of `middle`, given that of what `feed` returned first."""
    gate, up = gate_up.chunk(2, -1)
    through = by.back(gradient, layer.down)
    if inside:
        through = through + inside.back(DOWN, kept[DOWN], gradient)
    sigmoid = torch.sigmoid(gate)
    g_gate = through * up * sigmoid * (1 + gate * (1 - sigmoid))
    g_gate_up = torch.cat([g_gate, through * gate * sigmoid], -1)
    g_normed = by.back(g_gate_up, layer.gate_up)
    if inside:
        g_normed = g_normed + inside.back(GATE_UP, kept[GATE_UP], g_gate_up)
    return gradient + norm_back(g_normed, middle, layer.feed_norm, epsilon)


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
    attended, logsumexp = _attend(queries, keys, values, 0.0, False, attn_mask=rows.mask.values)
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
        attn_mask=rows.mask.values,
    )
    g_q = g_queries.transpose(1, 2).reshape(-1, h, e)[rows.packed]
    g_k, g_prefix_k = _before_back(g_keys, rows, sizes)
    g_v, g_prefix_v = _before_back(g_values, rows, sizes)
    g_qkv = torch.cat([g_q, g_k, g_v], 1).flatten(1)
    return g_qkv, torch.stack([g_prefix_k, g_prefix_v])


def times(x: Tensor, matrix: Matrix) -> Tensor:
    """Return `x W^T + bias`, `[t, k] -> [t, n]`; narrower weights are widened to `x`'s type."""
    if matrix.scale is None:
        y = x @ matrix.values.T.to(x.dtype)
    else:
        levels, row_scale = rounded(x)
        product = multiplied(levels, matrix.values.T).float()
        y = (product * row_scale * matrix.scale).to(x.dtype)
    return y if matrix.bias is None else y + matrix.bias


def times_back(gradient: Tensor, matrix: Matrix) -> Tensor:
    """Return the gradient of `x`, `[t, n] -> [t, k]`."""
    if matrix.scale is None:
        return gradient @ matrix.values.to(gradient.dtype)
    levels, row_scale = rounded(gradient * matrix.scale)
    return (multiplied(levels, matrix.values).float() * row_scale).to(gradient.dtype)


class Products(NamedTuple):
    """How a layer multiplies: the two functions above, or equals of them."""

    times: Callable[[Tensor, Matrix], Tensor] = times
    back: Callable[[Tensor, Matrix], Tensor] = times_back


def multiplied(left: Tensor, right: Tensor) -> Tensor:
    """Return the int32 product of two int8 matrices.

    Without instructions for it torch multiplies int8 element by element, a hundred times slower
    than float32: then float32 does it, exactly up to sums of 2^24 and to one part in 2^24 beyond.
    """
    if has_int8():
        return torch._int_mm(left, right)
    return (left.float() @ right.float()).to(torch.int32)


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
    b, s = rows.mask.shape[0], rows.mask.shape[2]
    # What nobody sees is nothing: even 0 times another row's NaN would be NaN.
    if rows.seen is not None:
        prefix = _until(rows.seen, prefix)
    parts = [prefix, _until(rows.length, own[rows.spread].view(b, s, *own.shape[1:]))]
    if sizes.shared:
        parts.insert(1, own[: sizes.shared].expand(b, -1, -1, -1))
    joined = torch.cat(parts, 1).transpose(1, 2)
    return joined.repeat_interleave(sizes.heads // sizes.kv_heads, 1)


def _until(lengths: Tensor, x: Tensor) -> Tensor:
    """Return `x [b, n, g, e]` with 0 from each row's length on."""
    there = torch.arange(x.shape[1]) < lengths[:, None]
    return x.masked_fill(~there[..., None, None], 0)


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
