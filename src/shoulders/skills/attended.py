"""What the prompts of a skill attended to: their generators' cross-attention over one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoulders.prompts.generator import PromptGenerator
from shoulders.skills.skill import Skill


@dataclass(frozen=True, slots=True)
class Attended:
    """What the prompt of one pass attended to.

    Attributes:
        number: of the pass, from 1.
        tokens: the `t` positions that the encoder read, as text.
        weights: `[p, t]` float32, a row for each prompt position; each sums to 1.
    """

    number: int
    tokens: tuple[str, ...]
    weights: np.ndarray


def attended(skill: Skill, texts: Sequence[str]) -> list[Attended]:
    """Compute what each input-dependent prompt of a skill attended to, the first pass first.

    Args:
        skill: what has answered; prompts of other kinds attend to nothing and are left out.
        texts: what its stages read, in order: the input, then what stood in its place after each
            proposing pass.
    """
    found = []
    for stage, text in zip(_reading(skill), texts, strict=False):
        producers = (*(earlier.producer for earlier in stage.parts.earlier), stage.producer)
        for number, producer in zip(stage.config.stage, producers, strict=True):
            generator = getattr(producer, "generator", None)
            if isinstance(generator, PromptGenerator):
                own = stage.config.passes[number].producer_text(text)
                weights = generator.attention([own])[0].float().cpu().numpy()
                found.append(Attended(number + 1, tuple(generator.tokens(own)), weights))
    return found


def _reading(skill: Skill) -> list[Skill]:
    """Return the stages that read a text, in order: not those where a vote takes the answer."""
    before = skill.proposals
    if before is None:
        return [skill]
    own = [skill] if before.config.chooser == "second_pass" else []
    return [*_reading(before.skill), *own]
