"""The keys/values that generation reads: one block of memory, written in place."""

from __future__ import annotations

import torch
from torch import Tensor

from shoulders.lm.prompt import Prompt
from shoulders.lm.updates import Updates


class Cache:
    """Keys/values of rows as generation reads them, in one block with room to spare.

    A row is a slot of the block and a length; when rows leave, their slots are only forgotten.

    Attributes:
        values: `[layers, 2, slots, room, kv_heads, head_dim]`.
        slots: `[b]` int64, each row's slot.
        lengths: `[b]` int64, positions that each row holds.
        updates: of each row's states between layers; they are applied to whatever is read.
    """

    def __init__(
        self, values: Tensor, slots: Tensor, lengths: Tensor, updates: Updates | None = None
    ) -> None:
        self.values, self.slots, self.lengths = values, slots, lengths
        self.updates = updates

    @classmethod
    def of(
        cls, prompt: Prompt, shape: tuple[int, int, int], room: int, dtype: torch.dtype
    ) -> Cache:
        """Make a cache that holds every row's prefix, without the padding.

        `shape` is the LM's layers, key/value heads and head width; `room` positions a row.
        """
        layers, kv_heads, width = shape
        b = prompt.rows
        # Zeros: attention multiplies what a row does not see by nothing, and NaN would survive.
        values = torch.zeros(layers, 2, b, room, kv_heads, width, dtype=dtype)
        lengths = prompt.keys_values_mask.sum(1)
        if prompt.keys_values.shape[4]:
            arranged = prompt.keys_values.permute(1, 2, 0, 4, 3, 5)
            for row, (mask, length) in enumerate(
                zip(prompt.keys_values_mask, lengths.tolist(), strict=True)
            ):
                values[:, :, row, :length] = arranged[:, :, row, mask]
        return cls(values, torch.arange(b), lengths, prompt.updates)

    def only_first(self) -> Cache:
        """Return a cache of the first row alone, which writes into the same block."""
        updates = self.updates.select([0]) if self.updates else None
        return Cache(self.values, self.slots[:1], self.lengths[:1], updates)

    def copy_first(self, first: Cache) -> None:
        """Give every row what the first one has read since `only_first`."""
        start, end = int(self.lengths[0]), int(first.lengths[0])
        self.values[:, :, 1:, start:end] = self.values[:, :, :1, start:end]
        self.lengths = self.lengths + (end - start)

    def repeat(self, n: int) -> None:
        """Make every row `n` rows with equal contents."""
        self.values = self.values[:, :, self.slots.repeat_interleave(n)]
        self.lengths = self.lengths.repeat_interleave(n)
        self.slots = torch.arange(len(self.lengths))
        if self.updates is not None:
            self.updates = self.updates.repeat(n)

    def grow(self) -> None:
        """Double the room of every row."""
        self.values = torch.cat([self.values, torch.zeros_like(self.values)], 3)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.slots, self.lengths = self.slots[rows], self.lengths[rows]
        if self.updates is not None:
            self.updates = self.updates.select(rows.tolist())
