"""What is trained of a skill: producers and links, by the number of their pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.prompts.build import build_producer
from shoulders.prompts.interface import Producer, Surroundings
from shoulders.recursion.chain import Link
from shoulders.recursion.connector import Connector, ConnectorConfig
from shoulders.recursion.latent import LatentLink
from shoulders.skills.config import SkillConfig


class Earlier(NamedTuple):
    """A pass whose states go on to the next one."""

    producer: Producer | None
    link: Link


class Parts(NamedTuple):
    """The networks around the frozen LM, of the passes that are computed as one network.

    Attributes:
        earlier: passes before the last, in order.
        producer: of the last pass's prompt.
        trained: all of them as one module; tensors of a single pass have the producer's names,
            those of several are called `passes.NUMBER.prompt...` and `passes.NUMBER.link...`.
    """

    earlier: tuple[Earlier, ...]
    producer: Producer | None
    trained: nn.Module | None

    @property
    def prompt_length(self) -> int:
        """Window positions that the longest prompt of its passes takes."""
        producers = (self.producer, *(one.producer for one in self.earlier))
        return max(producer.length if producer else 0 for producer in producers)


def build_parts(
    lm: FrozenLM,
    config: SkillConfig,
    encoder: Callable[[str], FrozenEncoder],
    random: torch.Generator | None,
) -> Parts:
    """Build the last stage of a skill; `random` initialises its values, or they are to be loaded.

    Raises `RecipeError` for parts that do not fit the LM.
    """
    earlier: list[Earlier] = []
    named: dict[str, nn.Module] = {}
    producer: Producer | None = None
    for number in config.stage:
        one = config.passes[number]
        own: dict[str, nn.Module] = {}
        producer = None
        if one.prompt is not None:
            producer = build_producer(
                one.prompt, Surroundings(lm, lambda name: encoder(name).beside(lm.device))
            )
            own["prompt"] = cast(nn.Module, producer)
        if one.link is not None:
            if one.link == "same":
                link = earlier[-1].link
            else:
                made = Connector if isinstance(one.link, ConnectorConfig) else LatentLink
                module = cast(Any, made)(one.link, lm)
                own["link"], link = module, module
            earlier.append(Earlier(producer, link))
        if random is not None:
            for part in own.values():
                cast(Any, part).initialise(lm, random)
        if own:
            named[str(number)] = nn.ModuleDict(own)
    if len(config.passes) == 1:
        return Parts((), producer, cast("nn.Module | None", producer))
    passes = nn.ModuleDict({"passes": nn.ModuleDict(named)}) if named else None
    return Parts(tuple(earlier), producer, passes)


def encoders_of(parts: Parts) -> Iterator[FrozenEncoder]:
    """Yield the frozen encoders that the producers read with, each once."""
    seen: set[int] = set()
    for producer in (*(e.producer for e in parts.earlier), parts.producer):
        for encoder in producer.encoders() if producer is not None else ():
            if id(encoder) not in seen:
                seen.add(id(encoder))
                yield encoder


def written(producer: Producer | None, texts: Sequence[str], lm: FrozenLM) -> Prompt:
    """Return a pass's prompts for `b` texts."""
    return Prompt.empty(len(texts), lm.device) if producer is None else producer(texts)
