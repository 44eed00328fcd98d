"""Static prefix: trained keys and values for every layer (Li & Liang 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_keys_values
from shoulders.prompts.interface import ProducerConfig, Surroundings

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {"lr": 3e-2}


class Config(ProducerConfig):
    """A table of `length` keys and values per layer."""

    init: InitConfig = InitConfig()


class Producer(nn.Module):
    """`[layers, 2, kv_heads, p, head_dim]` trained keys/values.

    No positions to compute per request, and no gradient through the LM's first layer. Each
    layer's keys and values are trained in units of their own scale: the keys of one layer
    may be a hundred times larger than the values of another.
    """

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        s = around.lm.prefix_shape
        self.base = nn.Parameter(torch.zeros(s.layers, 2, s.kv_heads, config.length, s.head_dim))
        self.register_buffer("scale", torch.ones(s.layers, 2, 1, 1, 1))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start from what the LM caches when it reads the configured tokens."""
        prefix = initial_keys_values(self._config.init, lm, self.length, random)
        self.scale.copy_(prefix.std((2, 3, 4), keepdim=True))
        with torch.no_grad():
            self.base.copy_(prefix / self.scale)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: a static prefix does not read the input."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return the same prefix for each of `b` texts."""
        return Prompt.of_keys_values((self.base * self.scale)[None]).repeated(len(texts))
