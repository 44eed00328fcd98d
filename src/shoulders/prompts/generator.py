"""The trained network between a frozen encoder and the prompt of ID-PT.

Learned queries read the encoder's variable-length output through cross-attention layers and
become a fixed number of vectors (arXiv 2204.10019, section on input-dependent prompts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from shoulders.encoders.cache import EncoderCache
from shoulders.encoders.frozen import FrozenEncoder
from shoulders.errors import RecipeError
from shoulders.prompts.interface import Surroundings


class GeneratorConfig(BaseModel):
    """The reading network.

    Attributes:
        encoder: `embedded`, a Hub id or a folder.
        encoder_prompt: learned vectors inside the encoder's input (the paper's prompt-tuned
            encoder); 0 leaves it out, and then its outputs are cached on disk.
        width: width `w` of queries and layers.
        layers: number of cross-attention layers.
        heads: attention heads; must divide `width`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = "embedded"
    encoder_prompt: int = Field(default=0, ge=0)
    width: int = Field(default=384, ge=1)
    layers: int = Field(default=2, ge=1)
    heads: int = Field(default=6, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class PromptGenerator(nn.Module):
    """Texts -> `[b, p, w]`: `p` learned queries attending to the encoded text."""

    def __init__(self, config: GeneratorConfig, length: int, around: Surroundings) -> None:
        super().__init__()
        self._encoder = around.encoder(config.encoder)
        self.encoder_prompt: nn.Parameter | None = None
        self._cache: EncoderCache | None = None
        if config.encoder_prompt:
            if config.encoder_prompt >= self._encoder.max_tokens - 2:
                raise RecipeError(
                    f"encoder_prompt {config.encoder_prompt} leaves no room for the input: "
                    f"{self._encoder.name} reads {self._encoder.max_tokens} positions"
                )
            shape = (config.encoder_prompt, self._encoder.embedding_size)
            self.encoder_prompt = nn.Parameter(torch.zeros(shape))
        else:
            self._cache = EncoderCache(self._encoder)
        self.queries = nn.Parameter(torch.zeros(length, config.width))
        self.read = nn.Linear(self._encoder.hidden_size, config.width)
        self.read_norm = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(
            CrossAttentionLayer(config.width, config.heads) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def initialise(self, random: torch.Generator) -> None:
        """Draw every weight from `random`, so that a seed fixes the start."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            elif name == "queries":
                nn.init.normal_(parameter, std=1.0, generator=random)
            elif name == "encoder_prompt":
                scale = self._encoder.embedding_scale
                nn.init.normal_(parameter, std=scale, generator=random)
            else:
                nn.init.xavier_uniform_(parameter, generator=random)

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoder."""
        yield self._encoder

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Return `[b, p, w]`; row `i` depends on text `i` alone."""
        x, memory, mask = self._given(texts)
        for layer in self.layers:
            x = layer(x, memory, mask)
        return self.norm(x)

    @torch.no_grad()
    def attention(self, texts: Sequence[str]) -> Tensor:
        """Return what each prompt position attends to in each text, `[b, p, t]`.

        The weights of the last cross-attention layer, mean over its heads, over the positions that
        `tokens` names; a row sums to 1, and padding has 0. For those who look inside: `forward`
        computes no weights.
        """
        x, memory, mask = self._given(texts)
        *before, last = self.layers
        for layer in before:
            x = layer(x, memory, mask)
        return cast(CrossAttentionLayer, last).weights(x, memory, mask)

    def tokens(self, text: str) -> list[str]:
        """Return the positions that a text is attended to at: a soft prompt's, and its tokens."""
        soft = 0 if self.encoder_prompt is None else len(self.encoder_prompt)
        (ids,) = self._encoder.tokenize([text], room=soft)
        decode = self._encoder.tokenizer.decode
        return [f"<soft {i}>" for i in range(1, soft + 1)] + [decode([one]) for one in ids]

    def _given(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[b, p, w]`, the texts' real positions `[n, w]`, and where they are.

        The last one is `[b, t]`, True at the `n` real positions.
        """
        if self._cache is not None:
            states, mask = self._cache.states(texts)
        else:
            assert self.encoder_prompt is not None
            ids = self._encoder.tokenize(texts, room=len(self.encoder_prompt))
            states, mask = self._encoder.states(ids, self.encoder_prompt)
        memory = self.read_norm(self.read(states[mask]))  # no pads are computed
        return self.queries.expand(len(texts), -1, -1), memory, mask


class CrossAttentionLayer(nn.Module):
    """Pre-norm Transformer layer: cross-attention to `memory`, then a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Map `x [b, p, w]`, given `memory [n, w]`, to `[b, p, w]`.

        `memory` holds the `n` positions at which `mask [b, t]` is True, row after row.
        """
        queries, keys, values = self._projected(x, memory, mask)
        read = nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask[:, None, None]
        )
        x = x + self.attention.out_proj(read.transpose(1, 2).flatten(2))
        fed: Tensor = x + self.feed(self.feed_norm(x))
        return fed

    def weights(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return the attention weights of `forward`, mean over heads, `[b, p, t]`."""
        queries, keys, _ = self._projected(x, memory, mask)
        scores = queries @ keys.transpose(2, 3) * queries.shape[-1] ** -0.5
        return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).mean(1)

    def _projected(self, x: Tensor, memory: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries `[b, h, p, w / h]`, keys and values `[b, h, t, w / h]`."""
        own, width = self.attention, x.shape[-1]
        weight, bias = own.in_proj_weight, own.in_proj_bias
        queries = nn.functional.linear(self.attention_norm(x), weight[:width], bias[:width])
        real = nn.functional.linear(memory, weight[width:], bias[width:])
        both = real.new_zeros(*mask.shape, 2 * width)
        both[mask] = real
        queries, keys, values = (
            part.unflatten(2, (own.num_heads, -1)).transpose(1, 2)
            for part in (queries, *both.split(width, 2))
        )
        return queries, keys, values
