"""Static prefix with low-rank updates whose parts a network turns up or down for each input.

Beyond the paper: every input of the skill shares the updates of the LM's states
(`shoulders.lm.updates`), and a network reads the input and writes how much of each it gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
from shoulders.prompts.producers import static_kv


class Config(ProducerConfig):
    """A static prefix of `length` positions, and gated updates of `rank` for every layer."""

    init: InitConfig = InitConfig()
    generator: GeneratorConfig = GeneratorConfig()
    rank: int = Field(default=64, ge=1)


class Producer(nn.Module):
    """`prefix` as in `static_kv`, `updates`, and gates `1 + project(generator(text))` of them.

    The generator has a query for every layer of the LM. The projection starts at zero: all gates
    start at one, and training starts as that of `static_lowrank`.
    """

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        plain = static_kv.Config(length=config.length, init=config.init)
        self.prefix = static_kv.Producer(plain, around)
        self.updates = LowRank(config.rank, around.lm)
        self.generator = PromptGenerator(config.generator, around.lm.layers, around)
        self.project = nn.Linear(config.generator.width, config.rank)
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens, without updates."""
        self.prefix.initialise(lm, random)
        ids = initial_ids(self._config.init, lm, self.length, random)
        self.updates.initialise(lm, ids, random)
        self.generator.initialise(random)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that reads the input."""
        yield from self.generator.encoders()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return the same prefix for each of `b` texts, and updates gated for each."""
        gates = 1 + self.project(self.generator(texts))
        updated: Prompt = self.updates(self.prefix(texts), gates)
        return updated
