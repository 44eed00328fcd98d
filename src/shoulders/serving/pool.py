"""Keys/values of all rows that one pass is generating: slots that rows take and give back.

Rows of different skills lie side by side and are read in one call; what a row sees is its own slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.fused import Blocks
from shoulders.lm.prompt import Prompt
from shoulders.lm.updates import Updates

STEP = 64  # positions by which the room of slots grows


class Pool:
    """Slots of equal room, as many and as long as the rows in them need.

    Args:
        blocks: fused layers of the LM whose keys/values they hold.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        layers, kv_heads, width = blocks.cache_shape
        self._values = torch.zeros(layers, 2, 0, 0, kv_heads, width, dtype=blocks.dtype)
        self._lengths = torch.zeros(0, dtype=torch.long)
        self._free: list[int] = []

    @property
    def room(self) -> int:
        """Positions that every slot has."""
        return self._values.shape[3]

    @property
    def used(self) -> int:
        """Number of slots that rows have taken."""
        return self._values.shape[2] - len(self._free)

    @property
    def position_bytes(self) -> int:
        """Bytes of one position of one slot."""
        layers, _, _, _, kv_heads, width = self._values.shape
        return layers * 2 * kv_heads * width * self._values.element_size()

    def enter(self, prompt: Prompt, room: int) -> int:
        """Take a slot for a row of one prompt; its prefix is written, its vectors are not.

        Args:
            prompt: of one row.
            room: positions that the row may come to need.
        """
        slot = self._take(room)
        mask = prompt.keys_values_mask[0]
        length = int(mask.sum())
        if length:
            # [layers, 2, heads, q, e] -> [layers, 2, q, heads, e]
            own = prompt.keys_values[0][:, :, :, mask].transpose(2, 3)
            self._values[:, :, slot, :length] = own.to(self._values)
        self._lengths[slot] = length
        return slot

    def copy(self, slot: int, count: int) -> list[int]:
        """Take `count` further slots that hold what one does."""
        length = int(self._lengths[slot])
        found = [self._take(self.room) for _ in range(count)]
        for other in found:
            self._values[:, :, other, :length] = self._values[:, :, slot, :length]
            self._lengths[other] = length
        return found

    def leave(self, slot: int) -> None:
        """Give a slot back."""
        self._lengths[slot] = 0
        self._free.append(slot)
        if len(self._free) == self._values.shape[2]:  # nobody is here: let the memory go
            self._values = self._values[:, :, :0, :0].clone()
            self._lengths, self._free = self._lengths[:0], []

    def read(
        self,
        x: Tensor,
        counts: list[int],
        slots: list[int],
        taps: tuple[int, ...] = (),
        updates: Updates | None = None,
    ) -> Tensor:
        """Read `counts[r]` further positions `x [t, d]` of the rows in some slots.

        `updates` are those of the rows' states between layers.

        Returns their hidden states, see `Blocks.read`.
        """
        index = torch.tensor(slots)
        cache = Cache(self._values, index, self._lengths[index], updates)
        states = self._blocks.read(x.to(self._blocks.dtype), counts, cache, taps)
        self._lengths[index] = cache.lengths
        return states

    def _take(self, room: int) -> int:
        slots, had = self._values.shape[2], self.room
        if room > had or not self._free:
            more = 0 if self._free else max(4, slots // 2)
            wanted = max(had, -(-room // STEP) * STEP)
            layers, _, _, _, kv_heads, width = self._values.shape
            values = torch.zeros(
                layers, 2, slots + more, wanted, kv_heads, width, dtype=self._values.dtype
            )
            values[:, :, :slots, :had] = self._values
            self._values = values
            self._lengths = torch.cat([self._lengths, torch.zeros(more, dtype=torch.long)])
            self._free += range(slots, slots + more)
        return self._free.pop()
