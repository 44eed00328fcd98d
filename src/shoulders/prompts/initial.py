"""Where a base prompt starts: real text, class labels, or sampled vocabulary.

Starting from real embeddings is what makes soft prompts train: random starts lose tens of
points (Lester et al. 2021, section 3.2; PEFT's own benchmark tables agree).
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from shoulders.errors import RecipeError
from shoulders.lm.frozen import FrozenLM


class InitConfig(BaseModel):
    """The tokens that a base prompt of `p` positions starts from.

    Attributes:
        source: `text` repeats (or cuts) `text` to p tokens; `labels` does so with the class
            labels; `vocabulary` samples p of the `top` most common tokens (byte-pair
            vocabularies are stored by frequency, so these are the lowest ids). By default what
            is given, else the vocabulary.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Literal["text", "labels", "vocabulary"] = "vocabulary"
    text: str | None = None
    labels: tuple[str, ...] = ()
    top: int = Field(default=5000, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if isinstance(values, dict) and "source" not in values:
            given = [name for name in ("text", "labels") if values.get(name)]
            if len(given) == 2:
                raise ValueError("init.text and init.labels: give one, or say init.source")
            return {**values, "source": given[0]} if given else values
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "text" and not (self.text and self.text.strip()):
            raise ValueError("init.source is 'text': init.text must be given")
        if self.source == "labels" and not any(label.strip() for label in self.labels):
            raise ValueError("init.source is 'labels': init.labels must be given")
        return self


def initial_ids(config: InitConfig, lm: FrozenLM, length: int, random: torch.Generator) -> Tensor:
    """Return the `[length]` token ids that the config names."""
    if config.source == "vocabulary":
        special = set(lm.tokenizer.all_special_ids)
        common = [i for i in range(min(config.top, lm.vocab_size)) if i not in special]
        if not common:
            raise RecipeError(
                f"init.top: the {config.top} lowest token ids of {lm.name} are all special; "
                "make it larger"
            )
        picks = torch.randint(len(common), (length,), generator=random)
        return torch.tensor([common[int(i)] for i in picks], device=lm.device)
    text = config.text if config.source == "text" else " ".join(config.labels)
    ids = lm.tokenize([text or ""])[0]
    repeated = (ids * (length // len(ids) + 1))[:length]
    return torch.tensor(repeated, device=lm.device)


@torch.no_grad()
def initial_vectors(
    config: InitConfig, lm: FrozenLM, length: int, random: torch.Generator
) -> Tensor:
    """Return the LM's embeddings of the initial tokens, `[length, d]` float32."""
    return lm.embed(initial_ids(config, lm, length, random)).float()


@torch.no_grad()
def initial_keys_values(
    config: InitConfig, lm: FrozenLM, length: int, random: torch.Generator
) -> Tensor:
    """Return what the LM itself caches when it reads the initial tokens.

    Shape `[layers, 2, kv_heads, length, head_dim]` float32, at positions 0 to length - 1:
    the prefix starts as an ordinary text prompt that needs no computing.
    """
    ids = initial_ids(config, lm, length, random)[None]
    cache = lm.new_cache()
    positions = torch.arange(length, device=lm.device)[None]
    lm.hidden(lm.embed(ids), torch.ones_like(ids), positions, cache)
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(layers).float()
