"""Prompts that skills have written; one that never changes is written once."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import read_once
from shoulders.prompts.interface import Producer
from shoulders.skills.skill import Skill


class WrittenPrompts:
    """The prompts of all skills of one LM.

    A skill that is served no more, and has no job left, takes its prompts with it.
    """

    def __init__(self, lm: FrozenLM) -> None:
        self._lm = lm
        # Kept as written (False), and as the LM has read them (True).
        self._kept: WeakKeyDictionary[Producer, dict[bool, Prompt]] = WeakKeyDictionary()

    def of(self, skill: Skill, number: int, text: str, *, read: bool) -> Prompt:
        """Return a pass's prompt for a text, as `Skill.written` does; -1 is the last pass.

        With `read` the LM has also read one that never changes: its keys/values stand for it.
        """
        producer = skill.parts.producer if number < 0 else skill.parts.earlier[number].producer
        if producer is not None and (kept := self._kept.get(producer, {}).get(read)) is not None:
            return kept
        with torch.no_grad():
            prompt = skill.written(number, [text])
            if producer is not None and prompt.shared:
                prompt = read_once(self._lm, prompt) if read else prompt
                self._kept.setdefault(producer, {})[read] = prompt
        return prompt
