"""The configuration of a skill: its passes, and how inputs and answers become tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shoulders.prompts.build import producer_config


class TextFormat(BaseModel):
    """How a row becomes tokens: `input + separator`, then `answer_prefix + answer + end`.

    With `chat`, the LM's own chat template stands around the input (as one user turn) in place
    of the separator.

    Input, separator and answer are tokenised apart, so that training and inference see the
    same tokens at their borders.

    Attributes:
        separator: text after every input.
        answer_prefix: text before every answer; most vocabularies know words with a leading
            space far better than without. It is not part of the answer.
        max_input_tokens: longest input (before the separator); None is what the LM's window
            leaves.
        keep: what to keep of a longer input: its `start` or `end` (wherever the instruction
            stands); None refuses it with an error that names the row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat: bool = False
    separator: str = "\nAnswer:"
    answer_prefix: str = " "
    max_input_tokens: int | None = Field(default=None, ge=1)
    keep: Literal["start", "end"] | None = None


class PassConfig(BaseModel):
    """One pass through the frozen LM: the producer of its prompt, or none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: dict[str, Any] | None = None

    @field_validator("prompt")
    @classmethod
    def _known(cls, spec: dict[str, Any] | None) -> dict[str, Any] | None:
        """Validate the producer's settings, and write out its defaults."""
        if spec is None:
            return None
        return {"kind": spec.get("kind"), **producer_config(spec).model_dump(mode="json")}


class SkillConfig(BaseModel):
    """A skill: its passes in order (one in this version) and its text format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: tuple[PassConfig, ...] = Field(default=(PassConfig(),), min_length=1, max_length=1)
    format: TextFormat = TextFormat()
