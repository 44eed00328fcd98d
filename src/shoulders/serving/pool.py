"""Keys/values of all rows that one pass is generating: slots that rows take and give back.

Rows of different skills lie side by side and are read in one call; what a row sees is its own slot.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from shoulders.lm.cache import Cache
from shoulders.lm.fused import Blocks
from shoulders.lm.prompt import Prompt
from shoulders.lm.updates import Updates

STEP = 64  # positions by which the room of slots grows
WORTH = 0.75  # a pool is made smaller where it comes to at most this share


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
        self._free: list[int] = []  # a heap: the lowest is taken, so that the end may be cut off
        self.most = 0  # bytes that it may grow to where that is more than it needs

    @property
    def room(self) -> int:
        """Positions that every slot has."""
        return self._values.shape[3]

    @property
    def used(self) -> int:
        """Number of slots that rows have taken."""
        return self._values.shape[2] - len(self._free)

    @property
    def bytes(self) -> int:
        """Bytes that its slots take."""
        return self._values.nbytes

    def bytes_with(self, more: int, room: int) -> int:
        """Return the bytes that it comes to with `more` slots taken, of so many positions each."""
        if not more:
            return self.bytes
        slots = self._values.shape[2] + max(0, more - len(self._free))
        return slots * max(self.room, _rounded(room)) * self.position_bytes

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
        heapq.heappush(self._free, slot)
        if len(self._free) == self._values.shape[2]:  # nobody is here: let the memory go
            self._values = self._values[:, :, :0, :0].clone()
            self._lengths, self._free = self._lengths[:0], []

    def trim(self, room: int) -> None:
        """Let go of slots at the end, and of positions beyond `room`, that nobody needs any more.

        A long row has given room to every slot: without this it would stay for as long as anybody
        is there. What is hardly smaller stays: it would have to be copied.
        """
        slots = self._values.shape[2]
        free = set(self._free)
        top = next((one + 1 for one in reversed(range(slots)) if one not in free), 0)
        wanted = min(self.room, _rounded(room))
        if top * wanted <= WORTH * slots * self.room:
            self._values = self._values[:, :, :top, :wanted].clone()
            self._lengths = self._lengths[:top].clone()
            self._free = [one for one in sorted(free) if one < top]

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
            wanted = max(had, _rounded(room))
            more = 0
            if not self._free:
                affordable = self.most // (wanted * self.position_bytes) - slots
                more = max(1, min(max(4, slots // 2), affordable))
            layers, _, _, _, kv_heads, width = self._values.shape
            values = torch.zeros(
                layers, 2, slots + more, wanted, kv_heads, width, dtype=self._values.dtype
            )
            values[:, :, :slots, :had] = self._values
            self._values = values
            self._lengths = torch.cat([self._lengths, torch.zeros(more, dtype=torch.long)])
            self._free += range(slots, slots + more)
        return heapq.heappop(self._free)


def _rounded(room: int) -> int:
    return -(-room // STEP) * STEP
