"""Input-dependent prefix with low-rank factors: one written for each input, one trained for all.

Beyond the paper: a prefix can say what an input needs, factors beside the frozen weights
(`shoulders.lm.factors`) what every input of the skill needs.
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
from shoulders.prompts.factors import LowRankFactors
from shoulders.prompts.generator import GeneratorConfig, PromptGenerator
from shoulders.prompts.initial import InitConfig
from shoulders.prompts.interface import ProducerConfig, Surroundings
from shoulders.prompts.producers import idpt_kv

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {
    "lr": 1e-2,
    "lr_for": {"prefix.generator": 5e-4, "prefix.project": 1e-4, "updates": 1e-3},
}


class Config(ProducerConfig):
    """An input-dependent prefix of `length` positions, and factors of `rank` for every product."""

    init: InitConfig = InitConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rank: int = Field(default=32, ge=1)


class Producer(nn.Module):
    """`prefix` as in `idpt_kv`, and `factors` that are alike for every input."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self.length = config.length
        written = idpt_kv.Config(length=config.length, init=config.init, generator=config.generator)
        self.prefix = idpt_kv.Producer(written, around)
        self.factors = LowRankFactors(config.rank, around.lm)

    @property
    def generator(self) -> PromptGenerator:
        """The network that writes the prefix."""
        return self.prefix.generator

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens, without factors."""
        self.prefix.initialise(lm, random)
        self.factors.initialise(random)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that the prefix's network reads with."""
        yield from self.prefix.encoders()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return a prefix for each of `b` texts, `[b, layers, 2, kv_heads, p, head_dim]`."""
        changed: Prompt = self.factors(self.prefix(texts))
        return changed
