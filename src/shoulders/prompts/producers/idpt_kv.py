"""Input-dependent prefix: a network writes keys and values of every layer for each input.

Beyond the paper, whose prompts are vectors at the input: the same generator, but its output
reaches every layer's attention directly and takes no positions to compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.generator import GeneratorConfig, PromptGenerator
from shoulders.prompts.initial import InitConfig, initial_keys_values
from shoulders.prompts.interface import ProducerConfig, Surroundings

# Optimizer and rates to begin with: chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {
    "kind": "muon",
    "lr": 1e-2,
    "lr_for": {"generator": 1e-3, "project": 2e-4},
}


class Config(ProducerConfig):
    """A base prefix of `length` positions, and a network that adds to it per input."""

    init: InitConfig = InitConfig()
    generator: GeneratorConfig = GeneratorConfig()


class Producer(nn.Module):
    """`base + project(generator(text))`, in units of each layer's own scale.

    The projection starts at zero, so that training starts from a good static prefix.
    """

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        s = self._shape = around.lm.prefix_shape
        self.base = nn.Parameter(torch.zeros(s.layers, 2, s.kv_heads, config.length, s.head_dim))
        self.generator = PromptGenerator(config.generator, config.length, around)
        per_position = s.layers * 2 * s.kv_heads * s.head_dim
        self.project = nn.Linear(config.generator.width, per_position)
        self.register_buffer("scale", torch.ones(s.layers, 2, 1, 1, 1))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prefix of the configured tokens."""
        prefix = initial_keys_values(self._config.init, lm, self.length, random)
        self.scale.copy_(prefix.std((2, 3, 4), keepdim=True))
        self.generator.initialise(random)
        with torch.no_grad():
            self.base.copy_(prefix / self.scale)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that reads the input."""
        yield from self.generator.encoders()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return a prefix `[b, layers, 2, kv_heads, p, head_dim]`, each written for its text."""
        s = self._shape
        written = self.project(self.generator(texts))
        written = written.view(len(texts), self.length, s.layers, 2, s.kv_heads, s.head_dim)
        return Prompt.of_keys_values((self.base + written.permute(0, 2, 3, 4, 1, 5)) * self.scale)
