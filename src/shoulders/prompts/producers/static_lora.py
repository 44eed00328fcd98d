"""Static prefix with low-rank factors: trained keys/values, and changes of the layers' products.

LoRA (Hu et al. 2021, arXiv 2106.09685) on every product of every layer, beside the frozen weights
and never merged into them (`shoulders.lm.factors`), behind the prefix of `static_kv`.
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
from shoulders.prompts.initial import InitConfig
from shoulders.prompts.interface import ProducerConfig, Surroundings
from shoulders.prompts.producers import static_kv

# Rates to begin with: chosen by the loss of training and validation rows of 24 tasks, docs/log.md.
RATES: dict[str, Any] = {"kind": "muon", "lr": 3e-3, "lr_for": {"factors": 6e-4}}


class Config(ProducerConfig):
    """A static prefix of `length` positions, and factors of `rank` for every product."""

    init: InitConfig = InitConfig()
    rank: int = Field(default=48, ge=1)


class Producer(nn.Module):
    """`prefix` as in `static_kv`, and `factors` that are alike for every input."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self.length = config.length
        plain = static_kv.Config(length=config.length, init=config.init)
        self.prefix = static_kv.Producer(plain, around)
        self.factors = LowRankFactors(config.rank, around.lm)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens, without factors."""
        self.prefix.initialise(lm, random)
        self.factors.initialise(random)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: neither part reads the input."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return the same prefix and factors for each of `b` texts."""
        changed: Prompt = self.factors(self.prefix(texts))
        return changed
