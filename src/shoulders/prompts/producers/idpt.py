"""Input-dependent prompt tuning (arXiv 2204.10019): a network writes each input's prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.generator import GeneratorConfig, PromptGenerator
from shoulders.prompts.initial import InitConfig, initial_vectors
from shoulders.prompts.interface import ProducerConfig, Surroundings

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {"lr": 1.0, "lr_for": {"generator": 1.5e-3, "project": 1.5e-3}}


class Config(ProducerConfig):
    """A base table of `length` vectors, and a network that adds to it per input."""

    init: InitConfig = InitConfig()
    generator: GeneratorConfig = GeneratorConfig()


class Producer(nn.Module):
    """`base + project(generator(text))`, in units of the LM's embedding scale.

    The projection starts at zero, so that training starts from a good static prompt.
    """

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        self.base = nn.Parameter(torch.zeros(config.length, around.lm.hidden_size))
        self.generator = PromptGenerator(config.generator, config.length, around)
        self.project = nn.Linear(config.generator.width, around.lm.hidden_size)
        self.register_buffer("scale", torch.ones(()))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prompt of the configured tokens."""
        vectors = initial_vectors(self._config.init, lm, self.length, random)
        self.scale.fill_(lm.embedding_scale)
        self.generator.initialise(random)
        with torch.no_grad():
            self.base.copy_(vectors / self.scale)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that reads the input."""
        yield from self.generator.encoders()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return prompt vectors `[b, p, d]`, each written for its text."""
        return Prompt.of_vectors((self.base + self.project(self.generator(texts))) * self.scale)
