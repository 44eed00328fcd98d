"""ID-SPAM (arXiv 2506.05629): the LM's own token embeddings, attended and pooled, become a prompt.

One trained self-attention layer reads the input's embeddings, their mean goes through a
bottleneck, and that writes all vectors of the prompt at once. No encoder is needed. Ours adds to a
trained base, which the paper's does not have, so that training starts from a good static prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.initial import InitConfig, initial_vectors
from shoulders.prompts.interface import ProducerConfig, Surroundings

# Learning rates to begin with (AdamW): those of `idpt`, whose task it has.
RATES: dict[str, Any] = {"lr": 1.0, "lr_for": {"reader": 1.5e-3, "project": 1.5e-3}}


class Config(ProducerConfig):
    """A base table of `length` vectors, and what the pooled input adds to it.

    Attributes:
        width: of the attention's queries, keys and values.
        bottleneck: numbers that the input is pooled to.
    """

    init: InitConfig = InitConfig()
    width: int = Field(default=384, ge=1)
    bottleneck: int = Field(default=128, ge=1)


class Reader(nn.Module):
    """Self-attention of one head, mean over positions, a bottleneck."""

    def __init__(self, d: int, width: int, bottleneck: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(d, width), nn.Linear(d, width)
        self.key = nn.Linear(d, width, bias=False)  # a softmax does not see one
        self.down = nn.Linear(width, bottleneck)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map embeddings `[b, t, d]`, real where `mask [b, t]` is True, to `[b, bottleneck]`."""
        read = nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x), attn_mask=mask[:, None]
        )
        pooled = (read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        narrow: Tensor = self.down(pooled).relu()
        return narrow


class Producer(nn.Module):
    """`base + project(reader(embeddings of the text))`, in units of the LM's embedding scale.

    The projection starts at zero, so that training starts from a good static prompt.
    """

    scale: Tensor

    def __init__(self, config: Config, around: Surroundings) -> None:
        super().__init__()
        self._config, self._lm = config, around.lm
        self.length = config.length
        d = around.lm.hidden_size
        self.base = nn.Parameter(torch.zeros(config.length, d))
        self.reader = Reader(d, config.width, config.bottleneck)
        self.project = nn.Linear(config.bottleneck, config.length * d)
        self.register_buffer("scale", torch.ones(()))
        self.to(around.lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Start as the static prompt of the configured tokens."""
        vectors = initial_vectors(self._config.init, lm, self.length, random)
        self.scale.fill_(lm.embedding_scale)
        for name, parameter in self.reader.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter, generator=random)
        with torch.no_grad():
            self.base.copy_(vectors / self.scale)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield nothing: it reads the LM's own embeddings."""
        yield from ()

    def forward(self, texts: Sequence[str]) -> Prompt:
        """Return prompt vectors `[b, p, d]`, each written for its text."""
        written = self.project(self.reader(*self._embedded(texts)))
        written = written.view(len(texts), self.length, -1)
        return Prompt.of_vectors((self.base + written) * self.scale)

    @torch.no_grad()
    def _embedded(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return embeddings `[b, t, d]` in units of their scale, and where they are, `[b, t]`.

        An empty text is read as the token that ends one.
        """
        token_ids = [ids or [self._lm.end_ids[0]] for ids in self._lm.tokenize(texts)]
        lengths = torch.tensor([len(ids) for ids in token_ids], device=self.base.device)
        embedded = self._lm.embed_rows(token_ids).to(self.base) / self.scale
        rows = pad_sequence(embedded.split(lengths.tolist()), batch_first=True)
        return rows, torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
