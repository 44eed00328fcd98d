"""Input-dependent prefix with low-rank updates: one written for each input, one trained for all.

Beyond the paper: a prefix can say what an input needs, a low-rank update beside the frozen layers
(`shoulders.lm.updates`) what every input of the skill needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.generator import GeneratorConfig, PromptGenerator
from shoulders.prompts.initial import InitConfig, initial_ids
from shoulders.prompts.interface import ProducerConfig, Surroundings
from shoulders.prompts.lowrank import LowRank
from shoulders.prompts.producers import idpt_kv

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {
    "lr": 1e-2,
    "lr_for": {"prefix.generator": 5e-4, "prefix.project": 1e-4, "updates": 1e-3},
}


class Config(ProducerConfig):
    """An input-dependent prefix of `length` positions, and updates of `rank` for every layer."""

    init: InitConfig = InitConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rank: int = Field(default=64, ge=1)


class Producer(nn.Module):
    """`prefix` as in `idpt_kv`, and `updates` that are alike for every input."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        written = idpt_kv.Config(length=config.length, init=config.init, generator=config.generator)
        self.prefix = idpt_kv.Producer(written, around)
        self.updates = LowRank(config.rank, around.lm)

    @property
    def generator(self) -> PromptGenerator:
        """The network that writes the prefix."""
        return self.prefix.generator

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens, without updates."""
        self.prefix.initialise(lm, random)
        ids = initial_ids(self._config.init, lm, self.length, random)
        self.updates.initialise(lm, ids, random)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that the prefix's network reads with."""
        yield from self.prefix.encoders()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return a prefix for each of `b` texts, `[b, layers, 2, kv_heads, p, head_dim]`."""
        updated: Prompt = self.updates(self.prefix(texts))
        return updated
