"""ID-SPAM (arXiv 2506.05629): the LM's own input embeddings, attended, pooled, become a prompt.

A trained self-attention layer reads the input's token embeddings, their mean goes through a
bottleneck, and that writes all vectors of the prompt at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_vectors
from shoulders.prompts.interface import ProducerConfig, Surroundings

# As `idpt`, whose task it has.
RATES: dict[str, Any] = {"lr": 1.0, "lr_for": {"reader": 1.5e-3, "project": 1.5e-3}}


class Config(ProducerConfig):
    """A base table of `length` vectors, and what the pooled input adds to it."""

    init: InitConfig = InitConfig()
    width: int = Field(default=384, ge=1)
    bottleneck: int = Field(default=128, ge=1)


class Reader(nn.Module):
    """Token embeddings `[b, n, d]` and mask `[b, n]` -> `[b, bottleneck]`."""

    def __init__(self, d: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(d, width) for _ in range(3))
        self.down = nn.Linear(width, bottleneck)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return what the pooled input comes to."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        read = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        pooled = (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.down(pooled).relu()


class Producer(nn.Module):
    """`base + project(reader(embeddings of the text))`, in units of the embedding scale."""

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config, self._lm, self.length = config, around.lm, config.length
        d = around.lm.hidden_size
        self.base = nn.Parameter(torch.zeros(config.length, d))
        self.reader = Reader(d, config.width, config.bottleneck)
        self.project = nn.Linear(config.bottleneck, config.length * d)
        self.register_buffer("scale", torch.ones(()))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prompt of the configured tokens."""
        self.scale.fill_(lm.embedding_scale)
        for name, parameter in self.reader.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter, generator=random)
        vectors = initial_vectors(self._config.init, lm, self.length, random)
        with torch.no_grad():
            self.base.copy_(vectors / self.scale)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: it reads the LM's own embeddings."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return prompt vectors `[b, p, d]`, each written for its text."""
        ids = [row or [0] for row in self._lm.tokenize(list(texts))]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        mask = torch.tensor([[i < len(row) for i in range(longest)] for row in ids])
        with torch.no_grad():
            read = self._lm.embed(padded.to(self.base.device)).float() / self.scale
        written = self.project(self.reader(read, mask.to(self.base.device)))
        written = written.view(len(texts), self.length, -1)
        return Prompt.of_vectors((self.base + written) * self.scale)
