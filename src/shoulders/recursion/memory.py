"""What a link has seen: keys/values of its own layers, for rows that grow and leave."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Keys/values of a link's layers.

    A row is a slot of the tensors and a length; several memories may be views of the same tensors
    (`view`), each with rows of its own.

    Attributes:
        slots: `[b]` int64, each row's slot.
        lengths: `[b]` int64, positions that each row has seen; set by `seen`.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.slots = torch.arange(rows, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._values: dict[int, Tensor] = {}  # layer -> [2, slots, heads, room, e]

    def view(self, slots: Tensor, lengths: Tensor) -> Memory:
        """Return a memory of some slots, which writes into the same tensors."""
        other = Memory(0, slots.device)
        other.slots, other.lengths, other._values = slots, lengths, self._values
        return other

    def joined(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Note new keys/values `[b, heads, s, e]` behind each row's earlier ones.

        Returns:
            All keys and values, `[b, heads, room, e]`, and which of them each of the `s` new
            positions sees, `[b, 1, s, room]` bool.
        """
        _, heads, s, e = keys.shape
        needed = int(self.lengths.max()) + s
        held = self._values.get(layer)
        if held is None:
            held = keys.new_zeros(2, 0, heads, 0, e)
        held = self._values[layer] = _grown(held, int(self.slots.max()) + 1, needed)
        places = self.lengths[:, None] + torch.arange(s, device=keys.device)
        held[0, self.slots[:, None], :, places] = keys.transpose(1, 2)
        held[1, self.slots[:, None], :, places] = values.transpose(1, 2)
        every = torch.arange(needed, device=keys.device)
        seen = every[None, None] <= places[..., None]
        own = held[:, self.slots, :, :needed]
        return own[0], own[1], seen[:, None]

    def seen(self, counts: Tensor) -> None:
        """Note that rows have grown by so many real positions, `[b]`."""
        self.lengths = self.lengths + counts

    def copy(self, source: int, targets: Tensor) -> None:
        """Give slots what another one holds."""
        for layer, held in self._values.items():
            held = self._values[layer] = _grown(held, int(targets.max()) + 1, held.shape[3])
            held[:, targets] = held[:, source : source + 1]

    def repeat(self, n: int) -> None:
        """Make every row `n` rows with equal contents."""
        chosen = self.slots.repeat_interleave(n)
        self.lengths = self.lengths.repeat_interleave(n)
        self._values = {k: v[:, chosen] for k, v in self._values.items()}
        self.slots = torch.arange(len(chosen), device=chosen.device)

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64 indices)."""
        self.lengths, self.slots = self.lengths[rows], self.slots[rows]


def _grown(held: Tensor, rows: int, room: int) -> Tensor:
    """Return a tensor with so many rows and so much room, or more, and what was in it.

    Twice what is needed, where something is: growing is rare then, and copies little.
    """
    if held.shape[1] >= rows and held.shape[3] >= room:
        return held
    most_rows = rows if held.shape[1] == 0 else max(2 * rows, held.shape[1])
    grown = held.new_zeros(2, most_rows, held.shape[2], max(2 * room, held.shape[3]), held.shape[4])
    grown[:, : held.shape[1], :, : held.shape[3]] = held
    return grown
