"""The configuration of a skill: its passes, and how inputs and answers become tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from shoulders.prompts.build import kind_of, producer_config
from shoulders.recursion.candidates import ProposeConfig
from shoulders.recursion.connector import ConnectorConfig
from shoulders.recursion.latent import LatentConfig

# Rows that are computed together: enough to keep two cores or a GPU busy, small in memory.
BATCH_TOKENS = 4096
BATCH_ROWS = 96


class TextFormat(BaseModel):
    """How a row becomes tokens: `input + separator`, then `answer_prefix + answer + end`.

    Ahead of it stands what the LM's own tokenizer begins a text with (`<s>` of Llama's, say).

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
        spelling: so many letters of the input's rarest words stand spelled out ahead of it
            (`shoulders.skills.spelling`); 0 for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    chat: bool = False
    separator: str = "\nAnswer:"
    answer_prefix: str = " "
    max_input_tokens: int | None = Field(default=None, ge=1)
    keep: Literal["start", "end"] | None = None
    spelling: int = Field(default=0, ge=0)


class PassConfig(BaseModel):
    """One pass through the frozen LM, and how its result reaches the next one.

    Attributes:
        prompt: the producer of its prompt, or none. Without a `kind` it is the default one
            (`shoulders.prompts.build.DEFAULT_KIND`).
        prompt_until: the producer reads the input up to the last occurrence of this text, the LM
            all of it. A pass over candidates (whose `propose.before` it then is) so keeps the
            prompt that it would have without them. None: it reads all, as the LM does.
        prompt_from: likewise from behind the first occurrence of this text (`propose.after`, where
            candidates stand ahead of the input).
        link: a network from its states to the next pass's embeddings (neural recursion); `same`
            is the one of the pass before.
        propose: its sampled answers go to the next pass as text (textual recursion).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: dict[str, Any] | None = None
    prompt_until: str | None = Field(default=None, min_length=1)
    prompt_from: str | None = Field(default=None, min_length=1)
    link: (
        Annotated[ConnectorConfig | LatentConfig, Field(discriminator="kind")]
        | Literal["same"]
        | None
    ) = None
    propose: ProposeConfig | None = None

    def producer_text(self, text: str) -> str:
        """Return what the producer reads of an input."""
        if self.prompt_from is not None and self.prompt_from in text:
            text = text.partition(self.prompt_from)[2]
        if self.prompt_until is not None and self.prompt_until in text:
            text = text.rpartition(self.prompt_until)[0]
        return text

    @field_validator("link", mode="before")
    @classmethod
    def _kind(cls, link: Any) -> Any:
        """Take a link without a kind for a Connector."""
        return {"kind": "connector", **link} if isinstance(link, dict) else link

    @field_validator("prompt")
    @classmethod
    def _known(cls, spec: dict[str, Any] | None) -> dict[str, Any] | None:
        """Validate the producer's settings, and write out its defaults."""
        if spec is None:
            return None
        return {"kind": kind_of(spec), **producer_config(spec).model_dump(mode="json")}


class SkillConfig(BaseModel):
    """A skill: its passes in order and its text format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: tuple[PassConfig, ...] = Field(default=(PassConfig(),), min_length=1)
    format: TextFormat = TextFormat()

    @model_validator(mode="after")
    def _joined(self) -> Self:
        for number, one in enumerate(self.passes[:-1]):
            if (one.link is None) == (one.propose is None):
                raise ValueError(
                    f"passes.{number} is followed by another: give it either a link (its states "
                    "go on) or propose (its sampled answers do)"
                )
            if one.link == "same" and (number == 0 or self.passes[number - 1].link is None):
                raise ValueError(f"passes.{number}.link: same as which? no pass before has a link")
        if self.passes[-1].link is not None or self.passes[-1].propose is not None:
            raise ValueError(
                f"passes.{len(self.passes) - 1} is the last: nothing reads its link or proposals; "
                "add a pass behind it, such as {prompt: null}"
            )
        return self

    @model_validator(mode="after")
    def _marks(self) -> Self:
        shown = [one.propose for one in self.passes if one.propose is not None]
        marks = {
            "prompt_until": [one.before for one in shown if one.place == "behind"],
            "prompt_from": [one.after for one in shown if one.place == "ahead"],
        }
        for number, one in enumerate(self.passes):
            for key, own in marks.items():
                mark = getattr(one, key)
                if mark is None:
                    continue
                if one.prompt is None:
                    raise ValueError(f"passes.{number}.{key}: this pass has no prompt to write")
                if shown and mark not in own:
                    raise ValueError(
                        f"passes.{number}.{key}: {mark!r} never stands in its input; candidates "
                        + (
                            f"come with {own[-1]!r} (propose.before, propose.after)"
                            if own
                            else f"stand {shown[-1].place} (propose.place)"
                        )
                    )
        return self

    def before_text(self) -> tuple[SkillConfig, ProposeConfig] | None:
        """Return what proposes the text that the last passes read, if anything does.

        That is: the passes up to the last that proposes, as a skill of their own.
        """
        for number in range(len(self.passes) - 1, -1, -1):
            propose = self.passes[number].propose
            if propose is not None:
                last = self.passes[number].model_copy(update={"propose": None})
                own = SkillConfig(passes=(*self.passes[:number], last), format=self.format)
                return own, propose
        return None

    @property
    def stage(self) -> range:
        """Numbers of the passes after the last text: what is computed as one network."""
        proposing = [i for i, one in enumerate(self.passes) if one.propose is not None]
        return range(proposing[-1] + 1 if proposing else 0, len(self.passes))
