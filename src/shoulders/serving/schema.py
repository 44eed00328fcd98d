"""The requests of the OpenAI-compatible API, checked and capped."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shoulders.lm.decode import DecodingConfig

MAX_SAMPLES, MAX_PROMPTS, MAX_TEXT = 32, 32, 200_000
MAX_TOKENS = 32_768  # of an answer; the LM's window ends it, too
CHAT_TOKENS = 512  # of a chat's answer, where the request does not say
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]


class StreamOptions(BaseModel):
    """What a stream ends with."""

    include_usage: bool | None = False


class Plain(BaseModel):
    """The only form that answers have: text."""

    type: Literal["text"]


class Common(BaseModel):
    """What both endpoints take; `null` is as good as nothing.

    Fields of OpenAI's and vLLM's that would change the answer, and are not had here, are refused
    where they ask for it; all others are ignored, as vLLM does.
    """

    model_config = ConfigDict(extra="ignore")

    model: Annotated[str, Field(min_length=1, max_length=200)]
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    details: bool = False  # ours: passages read, candidates proposed
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    timeout: Annotated[float, Field(gt=0, le=3600)] | None = None
    response_format: Plain | None = None
    top_k: Literal[-1, 0] | None = None
    min_p: Literal[0] | None = None
    repetition_penalty: Literal[1] | None = None
    length_penalty: Literal[1] | None = None
    min_tokens: Literal[0] | None = None
    ignore_eos: Literal[False] | None = None
    use_beam_search: Literal[False] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=0)] | None = None
    bad_words: Annotated[list[str], Field(max_length=0)] | None = None
    allowed_token_ids: None = None
    include_stop_str_in_output: Literal[False] | None = None
    truncate_prompt_tokens: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}

    def decoding(self, most: int, top: int, seed: int) -> DecodingConfig:
        """Return how to answer, `most` tokens long; `seed` where the request names none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return DecodingConfig(
            max_new_tokens=most,
            temperature=self.temperature,
            top_p=self.top_p,
            n=self.n,
            stop=tuple(stop),
            seed=seed if self.seed is None else self.seed % 2**63,
            top_logprobs=top,
        )


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str]:
        """The inputs."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TextPart(BaseModel):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=MAX_TEXT)]


class Message(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        Annotated[str, Field(max_length=MAX_TEXT)]
        | Annotated[list[TextPart], Field(max_length=64)]
        | None
    ) = None

    @property
    def text(self) -> str:
        """What it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    chat_template: None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None

    @model_validator(mode="after")
    def _said(self) -> Self:
        if not any(message.text.strip() for message in self.messages):
            raise ValueError("messages: all of them are empty")
        return self

    @property
    def most(self) -> int:
        """Longest answer, in tokens."""
        return self.max_completion_tokens or self.max_tokens or CHAT_TOKENS


class LoadRequest(BaseModel):
    """`POST /v1/load_adapter`: a folder inside the server's skill folder."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    path: Annotated[str, Field(min_length=1, max_length=500)]


class UnloadRequest(BaseModel):
    """`POST /v1/unload_adapter`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
