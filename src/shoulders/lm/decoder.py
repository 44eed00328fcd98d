"""Where generation keeps what it has read: one way through fused layers, one through any LM.

Both give the logits of the next token of every row, take the chosen tokens, and let rows leave;
`shoulders.lm.decode` chooses tokens and knows nothing of caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.combine import check_window, combine
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.fused import Blocks
from shoulders.lm.prompt import Prompt

FIRST_ROOM = 64  # positions beyond the input that a cache begins with


class Decoder(Protocol):
    """Rows that are being generated.

    Attributes:
        lengths: `[b]` int64, positions that each row takes so far: prompt and tokens.
        logits: `[b, vocabulary]` float32 of each row's next token.
    """

    lengths: Tensor
    logits: Tensor

    def repeat(self, n: int) -> None:
        """Make every row `n` rows that share what was read."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Read one token per row, `[b]`, and set the logits of the next."""
        ...


@torch.no_grad()
def prefilled(
    lm: FrozenLM, prompt: Prompt, token_ids: Sequence[Sequence[int]], room: int
) -> Decoder:
    """Read `b` rows of `[prompt ; tokens]`, with room for so many further tokens each.

    Raises `WindowError` as `combine` does.
    """
    check_window(lm, prompt, np.array([len(ids) for ids in token_ids]))
    longest = max(len(ids) for ids in token_ids) + int(prompt.lengths().max()) + room
    in_window = lm.sliding_window is None or longest <= lm.sliding_window
    if lm.blocks is not None and in_window:
        return BlocksDecoder(lm, lm.blocks, prompt, token_ids, room)
    return ModelDecoder(lm, prompt, token_ids)


class BlocksDecoder:
    """Fused layers and a cache of fixed size: nothing is copied when rows grow or leave."""

    def __init__(
        self,
        lm: FrozenLM,
        blocks: Blocks,
        prompt: Prompt,
        token_ids: Sequence[Sequence[int]],
        room: int,
    ) -> None:
        self._lm, self._blocks = lm, blocks
        longest = max(len(ids) for ids in token_ids) + int(prompt.lengths().max())
        # Most answers are short: room for a long one is made when it is needed.
        first_room = longest + min(room, FIRST_ROOM)
        self._cache = Cache.of(prompt, blocks.cache_shape, first_room, lm.dtype)
        if prompt.shared and prompt.vectors.shape[1]:
            # Read once what all rows begin with.
            first = self._cache.only_first()
            blocks.read(prompt.vectors[0].to(lm.dtype), [prompt.vectors.shape[1]], first)
            self._cache.copy_first(first)
            vectors: list[Tensor] = []
        elif prompt.vectors.shape[1]:
            both = zip(prompt.vectors, prompt.vector_mask, strict=True)
            vectors = [own[mask].to(lm.dtype) for own, mask in both]
        else:
            vectors = []
        embedded = lm.embed(torch.tensor([i for ids in token_ids for i in ids]))
        counts = [len(ids) for ids in token_ids]
        pieces: list[Tensor] = list(embedded.split(counts))
        if vectors:
            pieces = [piece for pair in zip(vectors, pieces, strict=True) for piece in pair]
            counts = [n + len(v) for n, v in zip(counts, vectors, strict=True)]
        hidden = blocks.read(torch.cat(pieces), counts, self._cache)
        self.lengths = self._cache.lengths.clone()
        self.logits = lm.logits(hidden[torch.tensor(counts).cumsum(0) - 1])

    def repeat(self, n: int) -> None:
        """See `Decoder`."""
        self._cache.repeat(n)
        self.lengths = self.lengths.repeat_interleave(n)
        self.logits = self.logits.repeat_interleave(n, 0)

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache.keep(rows)
        self.lengths = self.lengths[rows]

    @torch.no_grad()
    def append(self, tokens: Tensor) -> None:
        """See `Decoder`."""
        if int(self._cache.lengths.max()) == self._cache.values.shape[3]:
            self._cache.grow()
        hidden = self._blocks.read(self._lm.embed(tokens), [1] * len(tokens), self._cache)
        self.lengths = self.lengths + 1
        self.logits = self._lm.logits(hidden)


class ModelDecoder:
    """The Hugging Face model with its own kind of cache: any architecture, any device."""

    def __init__(self, lm: FrozenLM, prompt: Prompt, token_ids: Sequence[Sequence[int]]) -> None:
        self._lm = lm
        batch = combine(lm, prompt, token_ids, pad="left", keep_cache=True)
        assert batch.cache is not None  # keep_cache
        self._cache, self._mask = batch.cache, batch.mask
        self.lengths = batch.lengths
        hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, batch.cache)
        self.logits = lm.logits(hidden[:, -1])

    def repeat(self, n: int) -> None:
        """See `Decoder`."""
        self._cache.batch_repeat_interleave(n)
        self._mask = self._mask.repeat_interleave(n, 0)
        self.lengths = self.lengths.repeat_interleave(n)
        self.logits = self.logits.repeat_interleave(n, 0)

    def keep(self, rows: Tensor) -> None:
        """See `Decoder`."""
        self._cache.batch_select_indices(rows)
        self._mask, self.lengths = self._mask[rows], self.lengths[rows]

    @torch.no_grad()
    def append(self, tokens: Tensor) -> None:
        """See `Decoder`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        hidden = self._lm.hidden(
            self._lm.embed(tokens[:, None]), self._mask, self.lengths[:, None], self._cache
        )
        self.lengths = self.lengths + 1
        self.logits = self._lm.logits(hidden[:, -1])
