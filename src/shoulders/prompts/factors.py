"""The trained pairs of low-rank factors, a part of some producers (`shoulders.lm.factors`)."""

from __future__ import annotations

import torch
from torch import nn

from shoulders.lm.factors import Factors
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt


class LowRankFactors(nn.Module):
    """A pair of matrices of rank `r` for each site of each of the LM's layers.

    `down.i` is `[layers, k, r]` and `up.i` `[layers, r, n]` of site `i`. The second ones start at
    zero, so that training starts from the LM as it is.
    """

    def __init__(self, rank: int, lm: FrozenLM) -> None:
        super().__init__()
        down = [torch.zeros(lm.layers, site.reads, rank) for site in lm.sites]
        up = [torch.zeros(lm.layers, rank, sum(site.writes)) for site in lm.sites]
        self.down = nn.ParameterList(nn.Parameter(t) for t in down)
        self.up = nn.ParameterList(nn.Parameter(t) for t in up)
        self.to(lm.device)
        # One object, whichever rows use it: that is how those are found that share it.
        self._factors = Factors(lm.sites, tuple(self.down), tuple(self.up))

    @torch.no_grad()
    def initialise(self, random: torch.Generator) -> None:
        """Draw the first matrices, so that what they read keeps its size."""
        for down in self.down:
            drawn = torch.empty(down.shape).normal_(generator=random)
            down.copy_(drawn / down.shape[1] ** 0.5)

    def forward(self, prompt: Prompt) -> Prompt:
        """Return prompts with these factors."""
        return prompt.updated(self._factors)
