"""What a producer is. A further one is one file in `shoulders.prompts.producers`.

It holds a `Config`, a `Producer` and, where recipes may leave them out, its learning `RATES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt


class Producer(Protocol):
    """A trainable `torch.nn.Module`: input texts -> prompts.

    It is given inputs and never targets (promise 2), and row `i` of its result depends on
    text `i` alone (promise 3). Whether the result is vectors at the input, keys/values of every
    layer or updates of their states is its own business: combiner, decoder and artefact treat
    all alike.
    """

    length: int
    """Window positions that its prompt takes."""

    def __call__(self, texts: Sequence[str]) -> Prompt:
        """Write the prompts of `b` input texts."""
        ...

    def initialise(self, lm: FrozenLM, random: torch.Generator) -> None:
        """Set the starting values of a new producer; a loaded one is not initialised."""
        ...

    def encoders(self) -> Iterator[FrozenEncoder]:
        """Yield the frozen encoders it reads with; a skill is bound to them too."""
        ...

    # From torch.nn.Module, named for the type checker.
    def parameters(self) -> Iterator[nn.Parameter]: ...  # noqa: D102
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...  # noqa: D102
    def train(self, mode: bool = True) -> Any: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a producer is built beside: the LM it serves, and where encoders come from."""

    lm: FrozenLM
    encoder: Callable[[str], FrozenEncoder]


class ProducerConfig(BaseModel):
    """What every producer's config has.

    `length` counts positions (vectors or prefix).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(default=20, ge=1)
