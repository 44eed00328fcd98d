"""What a link has seen: keys/values of its own layers, for rows that grow and leave."""

from __future__ import annotations

import torch
from torch import Tensor


class Memory:
    """Keys/values of a link's layers.

    Attributes:
        lengths: `[b]` int64, positions that each row has seen; set by `seen`.
    """

    def __init__(self, rows: int, device: torch.device | str = "cpu") -> None:
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._values: dict[int, Tensor] = {}  # layer -> [2, b, heads, room, e]

    def joined(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Note new keys/values `[b, heads, s, e]` behind each row's earlier ones.

        Returns:
            All keys and values, `[b, heads, room, e]`, and which of them each of the `s` new
            positions sees, `[b, 1, s, room]` bool.
        """
        b, heads, s, e = keys.shape
        needed = int(self.lengths.max()) + s
        held = self._values.get(layer)
        if held is None or held.shape[3] < needed:
            # Twice what is needed: growing is rare, and copies little.
            grown = keys.new_zeros(2, b, heads, 2 * needed, e)
            if held is not None:
                grown[:, :, :, : held.shape[3]] = held
            self._values[layer] = held = grown
        places = self.lengths[:, None] + torch.arange(s, device=keys.device)
        rows = torch.arange(b, device=keys.device)[:, None]
        held[0, rows, :, places] = keys.transpose(1, 2)
        held[1, rows, :, places] = values.transpose(1, 2)
        every = torch.arange(needed, device=keys.device)
        seen = every[None, None] <= places[..., None]
        return held[0, :, :, :needed], held[1, :, :, :needed], seen[:, None]

    def seen(self, counts: Tensor) -> None:
        """Note that rows have grown by so many real positions, `[b]`."""
        self.lengths = self.lengths + counts

    def repeat(self, n: int) -> None:
        """Make every row `n` rows with equal contents."""
        self.lengths = self.lengths.repeat_interleave(n)
        self._values = {k: v.repeat_interleave(n, 1) for k, v in self._values.items()}

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (int64 indices)."""
        self.lengths = self.lengths[rows]
        self._values = {k: v[:, rows] for k, v in self._values.items()}
