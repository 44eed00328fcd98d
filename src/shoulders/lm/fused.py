"""Our own way through a Llama-style LM on a CPU: rows end to end, few large products, no pads.

`Blocks.hidden` runs the rows of a training batch with gradients, `Blocks.read` those of a cache
without: linear layers see no pads at all, attention sees each row by itself, and a prompt that
all rows share is computed once. Other LMs, and other devices, keep to the Hugging Face modules
(`shoulders.lm.pack`, `shoulders.lm.combine`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoulders.lm import block
from shoulders.lm.block import Products
from shoulders.lm.block8 import Block8
from shoulders.lm.block16 import Block16
from shoulders.lm.block32 import Block32
from shoulders.lm.cache import Cache
from shoulders.lm.gradient import Functions, LayerFunction, as_typed, inside_of
from shoulders.lm.inside import Work
from shoulders.lm.kernels import available
from shoulders.lm.laid import Laid
from shoulders.lm.layer import Layer, Matrix, Rows, Sizes
from shoulders.lm.layers import Layers
from shoulders.lm.layout import is_llama_style, laid_out
from shoulders.lm.pairs import Pairs
from shoulders.lm.placing import further_rows, laid_rows
from shoulders.lm.processor import fast_bfloat16, has
from shoulders.lm.prompt import Prompt
from shoulders.lm.tiles import Tiles
from shoulders.lm.updates import Placed
from shoulders.lm.wide import Wide


@dataclass(slots=True)
class Pack:
    """Rows laid end to end, ready for `Blocks.hidden`.

    Attributes:
        embeddings: `[t, d]`; a shared prompt's vectors come first.
        prefix: `[layers, 2, b, q, kv_heads, head_dim]`.
        rows: where each row lies.
        shared: positions of a prompt that all rows share.
        first_token: index in `t` of each row's first token.
        updates: of the rows' states between layers, or None.
    """

    embeddings: Tensor
    prefix: Tensor
    rows: Rows
    shared: int
    first_token: list[int]
    updates: Placed | None = None


class Blocks:
    """The layers of a Llama-style LM as plain matrices."""

    def __init__(self, model: Any) -> None:
        self._body = model.base_model
        first = self._body.layers[0]
        attention = first.self_attn
        config = model.config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.width = attention.head_dim
        self.epsilon = first.input_layernorm.variance_epsilon
        self.layers = [laid_out(layer) for layer in self._body.layers]
        stored = self.layers[0].attention_norm.dtype
        tiles = packing(self.layers) if stored == torch.bfloat16 else None
        self._tiles = tiles if isinstance(tiles, Tiles) else None
        # Of what goes in and comes out: float32 between bfloat16 products in tiles, and where the
        # processor is slow at bfloat16.
        widened = self._tiles is not None or not fast_bfloat16("cpu")
        self.dtype = torch.float32 if widened else stored
        if self.dtype != stored:
            self.layers = [in_float32(layer) for layer in self.layers]

    @classmethod
    def of(cls, model: Any) -> Blocks | None:
        """Lay out a model's layers, or return None where they are not Llama's."""
        return cls(model) if is_llama_style(model) else None

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key/value heads and head width: what `Cache.of` needs to know."""
        return len(self.layers), self.kv_heads, self.width

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether every row's prompt has the same number of positions of each form."""
        return bool(prompt.vector_mask.all()) and bool(prompt.keys_values_mask.all())

    def pack(self, prompt: Prompt, embedded: Tensor, counts: Sequence[int]) -> Pack:
        """Lay `b` rows of `[prompt ; embeddings]` end to end; `embedded` is `[t, d]`, without."""
        embedded = embedded.to(self.dtype)
        q, p = prompt.keys_values.shape[4], prompt.vectors.shape[1]
        shared = p if prompt.shared else 0
        pieces, first, spans, at, start = [], [], [], 0, shared
        if shared:
            pieces.append(prompt.vectors[0].to(embedded))
            spans.append((0, shared))
        for row, count in enumerate(counts):
            own = 0 if shared else p
            if own:
                pieces.append(prompt.vectors[row].to(embedded))
            pieces.append(embedded[at : at + count])
            first.append(start + own)
            spans.append((start, own + count))
            at, start = at + count, start + own + count
        embeddings = torch.cat(pieces)
        rows = laid_rows(embeddings, spans, q, shared, self._body.rotary_emb, self.width)
        prefix = self._prefix(prompt, len(spans), embeddings)
        updates = None
        if prompt.updates is not None:
            # What all rows share is updated as the first one is: its updates are theirs.
            lengths = torch.tensor([length for _, length in spans])
            owner = torch.arange(len(spans)).repeat_interleave(lengths) - int(shared > 0)
            updates = prompt.updates.placed(owner.clamp_min(0))
        return Pack(embeddings, prefix, rows, shared, first, updates)

    def hidden(self, pack: Pack, *, recompute: bool = False, taps: Sequence[int] = ()) -> Tensor:
        """Return last hidden states after the final norm, `[t, d]`; with taps `[k, t, d]`.

        `taps` are layers to return the states of instead: 0 is what the first layer reads, `i`
        what the `i`-th has written.

        With `recompute` only each layer's input is kept, and the rest computed again backwards:
        a third more work for a tenth of the memory.
        """
        sizes = Sizes(self.heads, self.kv_heads, self.width, self.epsilon, pack.shared)
        run = self._functions
        x, prefixes = pack.embeddings, pack.prefix.unbind(0)
        written = [x]
        for number, (layer, prefix) in enumerate(zip(self.layers, prefixes, strict=True)):
            placed, pairs = pack.updates.inside(number) if pack.updates else ([], [])
            added = placed, self._narrow
            x = LayerFunction.apply(
                x, prefix, layer, pack.rows, sizes, run, recompute, added, *pairs
            )
            if pack.updates is not None:
                x = pack.updates.applied(number, x)
            if taps:
                written.append(x)
        return self._result(x, written, taps)

    def read(
        self, x: Tensor, counts: Sequence[int], cache: Cache, taps: Sequence[int] = ()
    ) -> Tensor:
        """Read `counts[r]` further positions of every row of a cache, which grows by them.

        Args:
            x: `[t, d]`, the rows' positions end to end.
            counts: how many each row has, at least one.
            cache: with room for them.
            taps: layers to return the states of instead, see `hidden`.

        Returns:
            Last hidden states after the final norm, `[t, d]`; with taps `[k, t, d]`.
        """
        with torch.no_grad(), as_typed():
            return self._read(x, counts, cache, taps)

    def _read(self, x: Tensor, counts: Sequence[int], cache: Cache, taps: Sequence[int]) -> Tensor:
        x, lengths = x.to(self.dtype), torch.tensor(counts)
        starts = lengths.cumsum(0) - lengths
        owner = torch.arange(len(counts)).repeat_interleave(lengths)
        places = cache.lengths[owner] + torch.arange(len(x)) - starts[owner]
        rows = further_rows(
            x, places, owner, starts, lengths, cache, self._body.rotary_emb, self.width
        )
        sizes = Sizes(self.heads, self.kv_heads, self.width, self.epsilon, 0)
        slots, run = cache.slots[owner], self._functions
        updates = cache.updates.placed(owner) if cache.updates is not None else None
        h, g = self.heads, self.kv_heads
        if self._whole is not None and not taps:
            x = self._whole.read(x, cache.values, rows, places, sizes, updates)
            cache.lengths = cache.lengths + lengths
            return self._result(x, [], ())
        written = [x]
        for number, (layer, values) in enumerate(
            zip(self.layers, cache.values.unbind(0), strict=True)
        ):
            placed, pairs = updates.inside(number) if updates else ([], [])
            inside = inside_of(layer, (placed, self.dtype), pairs)
            x, qkv, _ = run.forward(x, values, Work(layer, rows, sizes, inside))
            if updates is not None:
                x = updates.applied(number, x)
            split = qkv.view(len(x), h + 2 * g, self.width)
            values[0, slots, places] = split[:, h : h + g]
            values[1, slots, places] = split[:, h + g :]
            if taps:
                written.append(x)
        cache.lengths = cache.lengths + lengths
        return self._result(x, written, taps)

    def _result(self, x: Tensor, written: Sequence[Tensor], taps: Sequence[int]) -> Tensor:
        if taps:
            return torch.stack([written[i] for i in taps])
        normed: Tensor = self._body.norm(x)
        return normed

    @functools.cached_property
    def _laid(self) -> Laid:
        kernels = available()
        return Laid(kernels.int8.packed if kernels and kernels.int8 else Tiles.packed)

    @functools.cached_property
    def _functions(self) -> Functions:
        if self.dtype != torch.float32 or (kernels := available()) is None:
            return block
        if self._tiles is not None:
            return Block16(kernels, self._tiles, self._laid)
        if self.layers[0].qkv.scale is None:
            wide = Wide(kernels.pairs, self._laid) if kernels.pairs else None
            return Block32(kernels, Products(wide.times, wide.back) if wide else Products())
        return Block8(kernels, self._laid)

    @functools.cached_property
    def _narrow(self) -> torch.dtype:
        """What factors are multiplied in: bfloat16 beside narrow weights, where that is fast."""
        narrow = self._tiles is not None or self.layers[0].qkv.scale is not None
        return torch.bfloat16 if narrow and has("avx512_bf16") else self.dtype

    @functools.cached_property
    def _whole(self) -> Layers | None:
        kernels = available()
        narrow = self._tiles is not None or self.layers[0].qkv.scale is not None
        if kernels is None or not narrow or packing(self.layers) is None:
            return None
        return Layers(kernels, self.layers, self._laid)

    def _prefix(self, prompt: Prompt, b: int, like: Tensor) -> Tensor:
        """Return `[layers, 2, b, q, kv_heads, head_dim]`; a shared row comes first."""
        if prompt.keys_values.shape[4] == 0:
            return like.new_zeros(len(self.layers), 2, b, 0, self.kv_heads, self.width)
        values = prompt.keys_values[:1] if prompt.shared else prompt.keys_values
        # [b, layers, 2, heads, q, width] -> [layers, 2, b, q, heads, width]
        arranged = values.permute(1, 2, 0, 4, 3, 5).to(like)
        return arranged.expand(-1, -1, b, -1, -1, -1)


def packing(layers: Sequence[Layer]) -> Tiles | Pairs | None:
    """Return our products of packed weights, where the processor has them and all matrices fit."""
    kernels = available()
    if kernels is None or kernels.int8 is None:
        return None
    matrices = [m for layer in layers for m in layer if isinstance(m, Matrix)]
    return kernels.int8 if all(kernels.int8.fits(m.values) for m in matrices) else None


def in_float32(layer: Layer) -> Layer:
    """Return a layer whose norms and biases are float32; its matrices stay as they are."""

    def wide(part: Tensor | Matrix) -> Any:
        if isinstance(part, Tensor):
            return part.float()
        return part._replace(bias=None if part.bias is None else part.bias.float())

    return Layer(*(wide(part) for part in layer))
