"""Static prefix with low-rank updates: trained keys/values, and changes of every layer's states.

Beyond the paper: what a prefix says reaches a position through attention alone; a low-rank update
beside the frozen layers changes the position itself (`shoulders.lm.updates`).
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
from shoulders.prompts.initial import InitConfig, initial_ids
from shoulders.prompts.interface import ProducerConfig, Surroundings
from shoulders.prompts.lowrank import LowRank
from shoulders.prompts.producers import static_kv

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {"lr": 3e-2, "lr_for": {"updates": 1e-3}}


class Config(ProducerConfig):
    """A static prefix of `length` positions, and updates of `rank` for every layer."""

    init: InitConfig = InitConfig()
    rank: int = Field(default=64, ge=1)


class Producer(nn.Module):
    """`prefix` as in `static_kv`, and `updates` that are alike for every input."""

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        plain = static_kv.Config(length=config.length, init=config.init)
        self.prefix = static_kv.Producer(plain, around)
        self.updates = LowRank(config.rank, around.lm)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens, without updates."""
        self.prefix.initialise(lm, random)
        ids = initial_ids(self._config.init, lm, self.length, random)
        self.updates.initialise(lm, ids, random)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: neither part reads the input."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return the same prefix and updates for each of `b` texts."""
        updated: Prompt = self.updates(self.prefix(texts))
        return updated
