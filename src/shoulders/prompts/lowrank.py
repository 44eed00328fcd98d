"""The trained matrices of low-rank updates, a part of some producers (`shoulders.lm.updates`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoulders.errors import LMError
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states
from shoulders.lm.updates import Matrices

ALPHA = 64  # the rank at which a unit is just what the layer adds


class LowRank(nn.Module):
    """A pair of matrices of rank `r` for each of the LM's layers, `2 layers d r` numbers.

    The second one starts at zero, so that training starts from the LM as it is. Updates are counted
    in what each layer itself adds to a position, divided by their rank as LoRA's are, so that one
    learning rate suits every rank.
    """

    unit: Tensor

    def __init__(self, rank: int, lm: FrozenLM) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(lm.layers, lm.hidden_size, rank))
        self.up = nn.Parameter(torch.zeros(lm.layers, rank, lm.hidden_size))
        self.register_buffer("unit", torch.ones(lm.layers))
        self.to(lm.device)
        # One object, whichever rows use it: that is how those are found that share it.
        self._matrices = Matrices(self.down, self.up, self.unit)

    @torch.no_grad()
    def initialise(self, lm: FrozenLM, ids: Tensor, random: torch.Generator) -> None:
        """Draw the first matrices, and measure the units on some token ids `[p]`."""
        down = torch.empty(self.down.shape).normal_(generator=random)
        self.down.copy_(down / lm.hidden_size**0.5)
        nothing, counts = Prompt.empty(1, lm.device), [len(ids)]
        taps = range(lm.layers)
        seen = states(lm, nothing, lm.embed(ids), counts, taps=taps).values[..., : len(ids), :]
        if seen.shape[-1] != lm.hidden_size:
            raise LMError(
                f"{lm.name}: its layers' states are {seen.shape[-1]} wide, its embeddings "
                f"{lm.hidden_size}: low-rank updates do not fit; use another kind of prompt"
            )
        # The last layer's states are not to be had from every LM: it counts as the one before it.
        added = (seen[1:] - seen[:-1]).float().square().mean(-1).sqrt().median(-1).values
        self.unit.copy_(torch.cat([added, added[-1:]]) * (ALPHA / self.down.shape[2]))

    def forward(self, prompt: Prompt) -> Prompt:
        """Return prompts with these updates."""
        return prompt.updated(self._matrices)
