"""Feedback without training: states aligned with the embeddings by a closed formula.

After LatentMAS (arXiv 2511.20639): with `U` the LM's output embeddings and `E` its input ones, the
map `A = (U^T U + r I)^-1 U^T E` takes a state to the mix of input embeddings that it stands for.
The zero-training baseline of neural recursion.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from shoulders.lm.frozen import FrozenLM
from shoulders.recursion.memory import Memory


class LatentConfig(BaseModel):
    """A link that is computed, not trained.

    Attributes:
        ridge: `r`, relative to the mean of the diagonal of `U^T U`.
        strength: how much of the aligned state replaces the token's embedding, from 0 to 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["latent"] = "latent"
    ridge: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    strength: float = Field(default=0.5, ge=0, le=1)


class LatentLink(nn.Module):
    """`(1 - strength) * embedding + strength * aligned state`, sized as embeddings are."""

    align: Tensor
    scale: Tensor
    taps: tuple[int, ...] = ()

    def __init__(self, config: LatentConfig, lm: FrozenLM) -> None:
        super().__init__()
        self._config = config
        self.register_buffer("align", torch.zeros(lm.hidden_size, lm.hidden_size))
        self.register_buffer("scale", torch.ones(()))
        self.to(lm.device)

    @torch.no_grad()
    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:  # noqa: ARG002
        """Compute the map from the LM's two tables of embeddings."""
        every = torch.arange(lm.vocab_size, device=lm.device)
        inputs = lm.embed(every).double()
        basis = torch.eye(lm.hidden_size, device=lm.device, dtype=lm.dtype)
        outputs = lm.logits(basis).double().T  # [vocabulary, d]
        gram = outputs.T @ outputs
        gram += self._config.ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        self.align.copy_(torch.linalg.solve(gram, outputs.T @ inputs))
        self.scale.fill_(lm.embedding_scale)

    def forward(
        self,
        states: Tensor,
        embeddings: Tensor,
        memory: Memory | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `Connector.forward`."""
        aligned = states.float() @ self.align
        aligned = aligned * (self.scale / aligned.std(-1, keepdim=True).clamp_min(1e-6))
        s = self._config.strength
        return ((1 - s) * embeddings + s * aligned).to(embeddings.dtype)
