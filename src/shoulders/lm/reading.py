"""What one pass has read: keys/values of rows, one way through fused layers, one through any LM.

A reading takes embeddings and gives hidden states; it knows neither token ids nor logits, so that
the passes of a recursion (`shoulders.recursion`) read with it as generation does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.combine import combine_embedded
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.fused import Blocks
from shoulders.lm.prompt import Prompt

FIRST_ROOM = 64  # positions beyond the input that a cache begins with


class Reading(Protocol):
    """Rows that are being read, and may grow.

    Attributes:
        lengths: `[b]` int64, positions that each row takes so far: prompt and tokens.
        states: `[t, d]` hidden states of the tokens read last, rows end to end; `[k, t, d]` where
            `k` layers were asked for (`taps`, see `FrozenLM.hidden`).
    """

    lengths: Tensor
    states: Tensor

    def repeat(self, n: int) -> None:
        """Make every row `n` rows that share what was read."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        ...

    def append(self, embeddings: Tensor) -> None:
        """Read one more position per row, `[b, d]`."""
        ...


@torch.no_grad()
def begun(
    lm: FrozenLM,
    prompt: Prompt,
    embedded: Tensor,
    counts: Sequence[int],
    room: int,
    taps: Sequence[int] = (),
) -> Reading:
    """Read `b` rows of `[prompt ; embeddings]`, with room for so many further positions each.

    Args:
        lm: the frozen LM.
        prompt: one per row.
        embedded: `[t, d]`, the rows' embeddings end to end.
        counts: how many each row has.
        room: further positions that each may grow by.
        taps: layers whose states are wanted instead of the last ones; see `FrozenLM.hidden`.
    """
    # No row grows beyond the LM's window, and which layers read it is not its neighbours' affair.
    longest = min(
        int((torch.tensor(counts) + prompt.lengths().cpu()).max()) + room, lm.max_positions
    )
    in_window = lm.sliding_window is None or longest <= lm.sliding_window
    if lm.blocks is not None and in_window:
        return BlocksReading(lm.blocks, prompt, embedded, counts, room, taps)
    return ModelReading(lm, prompt, embedded, counts, taps)


@torch.no_grad()
def read_once(lm: FrozenLM, prompt: Prompt) -> Prompt:
    """Return a prompt of one row with the keys/values that the LM computes of its vectors.

    It stands for `prompt` wherever that is read, bit by bit: what never changes need be read once.
    As it is where it has no vectors, or the LM no layers of our own or a shorter sliding window.
    """
    length = int(prompt.lengths()[0])
    if lm.blocks is None or not prompt.vectors.shape[1]:
        return prompt
    if lm.sliding_window is not None and length > lm.sliding_window:
        return prompt
    cache = Cache.of(prompt, lm.blocks.cache_shape, max(1, length), lm.blocks.dtype)
    vectors = prompt.vectors[0, prompt.vector_mask[0]]
    if len(vectors):
        lm.blocks.read(vectors.to(lm.blocks.dtype), [len(vectors)], cache)
    # [layers, 2, 1, room, heads, e] -> [1, layers, 2, heads, room, e]
    values = cache.values[:, :, 0, :length].transpose(2, 3)[None]
    return replace(Prompt.of_keys_values(values.clone()), updates=prompt.updates)


class BlocksReading:
    """Fused layers and a cache of fixed size: nothing is copied when rows grow or leave."""

    def __init__(
        self,
        blocks: Blocks,
        prompt: Prompt,
        embedded: Tensor,
        counts: Sequence[int],
        room: int,
        taps: Sequence[int],
    ) -> None:
        self._blocks, self._taps = blocks, taps
        longest = max(counts) + int(prompt.lengths().max())
        # Most answers are short: room for a long one is made when it is needed.
        first_room = longest + min(room, FIRST_ROOM)
        self._cache = Cache.of(prompt, blocks.cache_shape, first_room, blocks.dtype)
        vectors: list[Tensor] = []
        if prompt.shared and prompt.vectors.shape[1]:
            # Read once what all rows begin with.
            first = self._cache.only_first()
            blocks.read(prompt.vectors[0].to(blocks.dtype), [prompt.vectors.shape[1]], first)
            self._cache.copy_first(first)
        elif prompt.vectors.shape[1]:
            both = zip(prompt.vectors, prompt.vector_mask, strict=True)
            vectors = [own[mask].to(blocks.dtype) for own, mask in both]
        pieces: list[Tensor] = list(embedded.to(blocks.dtype).split(list(counts)))
        if vectors:
            own = [len(v) for v in vectors]
            pieces = [piece for pair in zip(vectors, pieces, strict=True) for piece in pair]
            total = [n + p for n, p in zip(counts, own, strict=True)]
            states = blocks.read(torch.cat(pieces), total, self._cache, taps)
            ends = torch.tensor(total).cumsum(0)
            lengths = torch.tensor(counts)
            # The states of the tokens alone, without those of the prompt before them.
            shift = (ends - lengths - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
            self.states = states[..., torch.arange(len(shift)) + shift, :]
        else:
            self.states = blocks.read(torch.cat(pieces), list(counts), self._cache, taps)
        self.lengths = self._cache.lengths.clone()

    def repeat(self, n: int) -> None:
        """See `Reading`."""
        self._cache.repeat(n)
        self.lengths = self.lengths.repeat_interleave(n)

    def keep(self, rows: Tensor) -> None:
        """See `Reading`."""
        self._cache.keep(rows)
        self.lengths = self.lengths[rows]

    @torch.no_grad()
    def append(self, embeddings: Tensor) -> None:
        """See `Reading`."""
        if int(self._cache.lengths.max()) == self._cache.values.shape[3]:
            self._cache.grow()
        ones = [1] * len(embeddings)
        self.states = self._blocks.read(embeddings, ones, self._cache, self._taps)
        self.lengths = self.lengths + 1


class ModelReading:
    """The Hugging Face model with its own kind of cache: any architecture, any device."""

    def __init__(
        self,
        lm: FrozenLM,
        prompt: Prompt,
        embedded: Tensor,
        counts: Sequence[int],
        taps: Sequence[int],
    ) -> None:
        self._lm, self._taps = lm, taps
        batch = combine_embedded(lm, prompt, embedded, counts, pad="left", keep_cache=True)
        assert batch.cache is not None  # keep_cache
        self._cache, self._mask = batch.cache, batch.mask
        self.lengths = batch.lengths
        self._updates = prompt.updates
        states = lm.hidden(
            batch.embeddings, batch.mask, batch.positions, batch.cache, taps, prompt.updates
        )
        width = states.shape[-2]
        self.states = torch.cat([states[..., i, width - n :, :] for i, n in enumerate(counts)], -2)

    def repeat(self, n: int) -> None:
        """See `Reading`."""
        self._cache.batch_repeat_interleave(n)
        self._mask = self._mask.repeat_interleave(n, 0)
        if self._updates is not None:
            self._updates = self._updates.repeat(n)
        self.lengths = self.lengths.repeat_interleave(n)

    def keep(self, rows: Tensor) -> None:
        """See `Reading`."""
        self._cache.batch_select_indices(rows)
        self._mask, self.lengths = self._mask[rows], self.lengths[rows]
        if self._updates is not None:
            self._updates = self._updates.select(rows.tolist())

    @torch.no_grad()
    def append(self, embeddings: Tensor) -> None:
        """See `Reading`."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(embeddings), 1)], 1)
        states = self._lm.hidden(
            embeddings[:, None],
            self._mask,
            self.lengths[:, None],
            self._cache,
            self._taps,
            self._updates,
        )
        self.states = states[..., 0, :]
        self.lengths = self.lengths + 1
