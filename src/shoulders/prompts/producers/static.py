"""Static prompt: the same trained vectors before every input (Lester et al. 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_vectors
from shoulders.prompts.interface import ProducerConfig, Surroundings

# Learning rates to begin with (AdamW): chosen on validation rows of 24 tasks, see docs/log.md.
RATES: dict[str, Any] = {"lr": 0.3}


class Config(ProducerConfig):
    """A table of `length` vectors."""

    init: InitConfig = InitConfig()


class Producer(nn.Module):
    """`[p, d]` trained vectors, in units of the LM's embedding scale.

    The units make one learning rate mean the same on any LM: embeddings of a standard
    deviation of 0.1 and of 10 move by the same share of it per step.
    """

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config = config
        self.length = config.length
        self.base = nn.Parameter(torch.zeros(config.length, around.lm.hidden_size))
        self.register_buffer("scale", torch.ones(()))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start from the LM's embeddings of the configured tokens."""
        vectors = initial_vectors(self._config.init, lm, self.length, random)
        self.scale.fill_(lm.embedding_scale)
        with torch.no_grad():
            self.base.copy_(vectors / self.scale)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: a static prompt does not read the input."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return the same `[p, d]` vectors for each of `b` texts."""
        return Prompt.of_vectors((self.base * self.scale)[None]).repeated(len(texts))
