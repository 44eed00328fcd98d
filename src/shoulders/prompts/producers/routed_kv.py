"""Mixture of prefixes: a router that reads the input weighs several trained static prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from shoulders.encoders.cache import EncoderCache
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_keys_values
from shoulders.prompts.interface import ProducerConfig, Surroundings

RATES: dict[str, Any] = {"lr": 3e-2, "lr_for": {"router": 1e-3}}
NOISE = 0.02  # of the scale: prefixes that are alike would stay alike


class Config(ProducerConfig):
    """`prefixes` of `length` positions, and a router of one linear layer."""

    init: InitConfig = InitConfig()
    encoder: str = "embedded"
    prefixes: int = Field(default=24, ge=2)


class Producer(nn.Module):
    """`sum_m softmax(router(mean state))_m prefix_m`, in units of each layer's own scale."""

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config, self.length = config, config.length
        self._encoder = around.encoder(config.encoder)
        self._cache = EncoderCache(self._encoder)
        s = around.lm.prefix_shape
        shape = (config.prefixes, s.layers, 2, s.kv_heads, config.length, s.head_dim)
        self.base = nn.Parameter(torch.zeros(shape))
        self.router = nn.Linear(self._encoder.hidden_size, config.prefixes)
        self.register_buffer("scale", torch.ones(s.layers, 2, 1, 1, 1))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start every prefix at the configured tokens, a little apart."""
        prefix = initial_keys_values(self._config.init, lm, self.length, random)
        self.scale.copy_(prefix.std((2, 3, 4), keepdim=True))
        noise = torch.empty(self.base.shape).normal_(std=NOISE, generator=random)
        with torch.no_grad():
            self.base.copy_(prefix / self.scale + noise)
        nn.init.xavier_uniform_(self.router.weight, generator=random)
        nn.init.zeros_(self.router.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder that the router reads."""
        yield self._encoder

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return a prefix for each of `b` texts, `[b, layers, 2, kv_heads, p, head_dim]`."""
        states, mask = self._cache.states(texts)
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        mean = nn.functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5
        shares = self.router(mean.to(self.base.device)).softmax(-1)
        mixed = torch.einsum("bm,m...->b...", shares, self.base)
        return Prompt.of_keys_values(mixed * self.scale)
