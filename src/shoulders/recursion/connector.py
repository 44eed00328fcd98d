"""The Connector: causal Transformer layers from one pass's states to the next pass's embeddings.

Section "recursive LMs" of arXiv 2204.10019. Beyond the paper: a skip path adds the token embeddings
that the first pass read, and the output projection starts at zero, so that the untrained recursion
is the one-pass LM, exactly.
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from shoulders.errors import RecipeError
from shoulders.lm.frozen import FrozenLM
from shoulders.recursion.memory import Memory

HEAD = 64  # width of a head where their number is not given
BASE = 10000.0  # of the rotary angles, RoFormer (arXiv 2104.09864)


class ConnectorConfig(BaseModel):
    """A trained Connector.

    Attributes:
        layers: causal Transformer layers.
        width: of these layers; None is the LM's.
        heads: of their attention; None makes them 64 wide.
        reads: the LM's `last` states after its final norm, those `before_norm`, or a learned mix
            of layers by number (0 is what the first layer reads).
        skip: add the token embeddings, and begin as the one-pass LM; False is the paper's form.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["connector"] = "connector"
    layers: int = Field(default=2, ge=1)
    width: int | None = Field(default=None, ge=2)
    heads: int | None = Field(default=None, ge=1)
    reads: Literal["last", "before_norm"] | tuple[int, ...] = "last"
    skip: bool = True

    @model_validator(mode="after")
    def _some_layer(self) -> Self:
        if not isinstance(self.reads, str) and (not self.reads or min(self.reads) < 0):
            raise ValueError("reads: name one layer or more, by numbers from 0")
        return self


class Connector(nn.Module):
    """Hidden states of one pass -> embeddings for the next, position by position, causally."""

    scale: Tensor

    def __init__(self, config: ConnectorConfig, lm: FrozenLM) -> None:
        super().__init__()
        d = lm.hidden_size
        width = config.width or d
        heads = config.heads or max(1, width // HEAD)
        if width % (2 * heads):
            raise RecipeError(
                f"connector: width {width} does not split into {heads} heads of an even width; "
                "set link.width and link.heads"
            )
        self.skip = config.skip
        self.taps = taps(config, lm)
        self.mix = nn.Parameter(torch.zeros(len(self.taps))) if len(self.taps) > 1 else None
        self.read_norm = nn.RMSNorm(d)
        self.read = nn.Linear(d, width, bias=False)
        self.layers = nn.ModuleList(CausalLayer(width, heads) for _ in range(config.layers))
        self.norm = nn.RMSNorm(width)
        self.write = nn.Linear(width, d, bias=False)
        self.register_buffer("scale", torch.ones(()))
        self.to(lm.device)

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Draw every weight from `random`; the output starts at zero where there is a skip."""
        self.scale.fill_(lm.embedding_scale)
        for name, parameter in self.named_parameters():
            if name == "mix":
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=random)
        if self.skip:
            nn.init.zeros_(self.write.weight)

    def forward(self, states: Tensor, embeddings: Tensor, memory: Memory | None = None) -> Tensor:
        """Return the embeddings that the next pass reads, `[b, s, d]`.

        Args:
            states: `[b, s, d]`, or `[k, b, s, d]` of `k` layers; rows begin at the left.
            embeddings: `[b, s, d]` of the tokens.
            memory: keys/values of earlier positions, which grows; None where all are here.
        """
        if self.mix is not None:
            # Layers differ in size: each counts by its direction.
            normed = self.read_norm(states.float())
            x = torch.einsum("k,kbsd->bsd", torch.softmax(self.mix, 0), normed)
        else:
            x = self.read_norm((states[0] if states.dim() == 4 else states).float())
        x = self.read(x)
        for number, layer in enumerate(self.layers):
            x = layer(x, number, memory)
        written = self.write(self.norm(x)) * self.scale
        return (embeddings + written if self.skip else written).to(embeddings.dtype)


class CausalLayer(nn.Module):
    """Pre-norm Transformer layer: causal attention with rotary positions, then feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_norm = nn.RMSNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor, number: int, memory: Memory | None) -> Tensor:
        """Map `x [b, s, w]` to `[b, s, w]`; `number` is this layer's place in the memory."""
        b, s, w = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, s, 3, self.heads, w // self.heads)
        places = torch.arange(s, device=x.device).expand(b, s)
        if memory is not None:
            places = places + memory.lengths[:, None]
        queries, keys = rotated(qkv[:, :, 0], places), rotated(qkv[:, :, 1], places)
        values = qkv[:, :, 2]
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))
        if memory is None:
            # Rows begin at the left: what a real position sees is never a pad.
            read = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            keys, values, seen = memory.joined(number, keys, values)
            read = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        x = x + self.output(read.transpose(1, 2).reshape(b, s, w))
        fed: Tensor = x + self.feed(self.feed_norm(x))
        return fed


def rotated(x: Tensor, places: Tensor) -> Tensor:
    """Turn `x [b, s, heads, e]` by its positions' angles, `places [b, s]` (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    rates = BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (places[..., None] * rates)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def taps(config: ConnectorConfig, lm: FrozenLM) -> tuple[int, ...]:
    """Return the layers whose states the Connector reads; none is the last, after its norm.

    Raises `RecipeError` for a layer that the LM has not, or does not show.
    """
    if config.reads == "last":
        return ()
    wanted = (lm.layers,) if config.reads == "before_norm" else config.reads
    for layer in wanted:
        if layer > lm.layers:
            raise RecipeError(f"reads: {lm.name} has layers 0 to {lm.layers}, not {layer}")
        if layer == lm.layers and lm.blocks is None:
            raise RecipeError(
                f"reads: {lm.name} shows its last layer's states only after the final norm; "
                "use last, or earlier layers"
            )
    return tuple(wanted)
