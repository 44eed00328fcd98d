"""Generation from `[prompt ; tokens]` with a key/value cache.

One prefill for all samples of a row, one new position per step, rows leave the batch as soon
as they end. Greedy results equal those of a loop without a cache, token for token (promise 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from shoulders.lm.decoder import Decoder, Source
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.sampling import likeliest, next_tokens, sample_stream
from shoulders.lm.written import Written


class DecodingConfig(BaseModel):
    """How to generate.

    `temperature` 0 is greedy; `n` samples share one prefill; generation ends at the LM's end
    token (not before `min_new_tokens`), at a `stop` string (not part of the text), after
    `max_new_tokens`, or where the LM's window ends. `top_logprobs` alternatives to every token are
    noted with their log-probabilities. Stop strings are looked for behind `answer_prefix`, where an
    answer begins with it: skills take it off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(default=64, ge=1)
    min_new_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seed: int = Field(default=0, ge=0)
    top_logprobs: int = Field(default=0, ge=0)
    answer_prefix: str = ""

    def behind(self, prefix: str) -> DecodingConfig:
        """Return the same for answers that begin with a prefix."""
        return self.model_copy(update={"answer_prefix": prefix})


@dataclass(slots=True)
class Completion:
    """One generated continuation.

    Attributes:
        text: without the stop string and special tokens.
        token_ids: every generated id, the end token included.
        logprob: sum of the natural-log probabilities of `token_ids` at temperature 1.
        finish: `stop` (end token or stop string) or `length`.
        logprobs: of each token at temperature 1, where alternatives were asked for.
        top: each token's most likely alternatives, ids and log-probabilities, likewise.
    """

    text: str
    token_ids: list[int]
    logprob: float
    finish: str
    logprobs: tuple[float, ...] = ()
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text of one sample during generation; `completion` is set when it has ended."""

    row: int
    sample: int
    text: str
    completion: Completion | None


@dataclass(slots=True)
class Running:
    """State of one sample while it is in a batch.

    Attributes:
        row, sample: whose it is.
        config: how it is generated.
        random: its own stream of random numbers.
        room: tokens that it may still grow to.
        ids, logprob, logprobs, top: so far; see `Completion`.
        written: its text so far.
        shown: characters of it that have been given out.
    """

    row: int
    sample: int
    config: DecodingConfig
    random: np.random.Generator
    room: int
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    written: Written = field(default_factory=Written)
    shown: int = 0


class Decoding(Protocol):
    """Rows that are being generated: a `Decoder`, or one whose rows choose `Together`."""

    @property
    def logits(self) -> Tensor:
        """Of each row's next token, `[b, vocabulary]` float32."""
        ...

    @property
    def lengths(self) -> Tensor:
        """Positions that each row takes so far, `[b]`."""
        ...

    def repeat(self, n: int) -> None:
        """Make every row `n` rows."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Read one token per row, `[b]`."""
        ...


def generate(
    lm: FrozenLM,
    prompt: Prompt,
    token_ids: Sequence[Sequence[int]],
    config: DecodingConfig,
    source: Source | None = None,
) -> list[list[Completion]]:
    """Generate `n` completions for each of `b` rows; raises `WindowError` as `combine` does.

    `source` writes the embeddings of tokens where they are not the LM's own.

    Examples:
        >>> from shoulders.lm.load import load_lm
        >>> lm = load_lm("embedded")
        >>> ids = lm.tokenize(["The capital of France is"])
        >>> generate(lm, Prompt.empty(1), ids, DecodingConfig(max_new_tokens=1))[0][0].text
        ' Paris'
    """
    return completed(stream(lm, prompt, token_ids, config, source), len(token_ids), config.n)


def completed(deltas: Iterator[Delta], rows: int, n: int) -> list[list[Completion]]:
    """Return the completions of `rows` rows of `n` samples that have been streamed to the end."""
    done: list[list[Completion | None]] = [[None] * n for _ in range(rows)]
    for delta in deltas:
        if delta.completion is not None:
            done[delta.row][delta.sample] = delta.completion
    return [[c for c in row if c is not None] for row in done]


def stream(
    lm: FrozenLM,
    prompt: Prompt,
    token_ids: Sequence[Sequence[int]],
    config: DecodingConfig,
    source: Source | None = None,
) -> Iterator[Delta]:
    """Generate as `generate` does, yielding text as soon as it can no longer change."""
    yield from streamed(
        lm, Decoder(lm, prompt, token_ids, config.max_new_tokens, source), token_ids, config
    )


def streamed(
    lm: FrozenLM, decoder: Decoding, token_ids: Sequence[Sequence[int]], config: DecodingConfig
) -> Iterator[Delta]:
    """Stream from rows that have been read; `token_ids` name each row's random streams."""
    if config.n > 1:
        decoder.repeat(config.n)
    lengths = decoder.lengths.tolist()
    running = [
        Running(
            row,
            sample,
            config,
            sample_stream(config.seed, ids, sample),
            min(config.max_new_tokens, lm.max_positions - lengths[row * config.n] + 1),
        )
        for row, ids in enumerate(token_ids)
        for sample in range(config.n)
    ]
    while True:
        chosen = choose(lm, decoder.logits, running)
        ended = []
        for state in running:
            delta = advance(lm, state)
            ended.append(delta.completion is not None)
            if delta.text or delta.completion:
                yield delta
        if all(ended):
            return
        if any(ended):
            keep = torch.tensor([i for i, e in enumerate(ended) if not e], device=lm.device)
            decoder.keep(keep)
            chosen = chosen[keep]
            running = [s for s, e in zip(running, ended, strict=True) if not e]
        decoder.append(chosen)


def choose(lm: FrozenLM, logits: Tensor, running: Sequence[Running]) -> Tensor:
    """Choose, record and return the next token of every running sample, `[b]`.

    Samples may differ in how they are generated; each is chosen as if it were alone.
    """
    early = [i for i, s in enumerate(running) if len(s.ids) < s.config.min_new_tokens]
    if early:
        logits = logits.clone()
        ends = torch.tensor(lm.end_ids, dtype=torch.long, device=logits.device)
        logits[torch.tensor(early, device=logits.device)[:, None], ends] = -torch.inf
    ways: dict[tuple[float, float], list[int]] = {}
    for i, state in enumerate(running):
        if state.config.temperature:
            ways.setdefault((state.config.temperature, state.config.top_p), []).append(i)
    chosen, whole = likeliest(logits)
    for (temperature, top_p), rows in ways.items():
        randoms = [running[i].random for i in rows]
        own = torch.tensor(rows, device=logits.device)
        chosen[own] = next_tokens(logits[own], randoms, temperature, top_p)
    logprobs = (logits.gather(1, chosen[:, None])[:, 0] - whole).tolist()
    for i, (state, token) in enumerate(zip(running, chosen.tolist(), strict=True)):
        state.ids.append(token)
        state.logprob += logprobs[i]
        if state.config.top_logprobs:
            most = min(state.config.top_logprobs, logits.shape[1])
            values, ids = (logits[i] - whole[i]).topk(most)
            state.logprobs.append(logprobs[i])
            state.top.append(tuple(zip(ids.tolist(), values.tolist(), strict=True)))
    return chosen


def advance(lm: FrozenLM, state: Running) -> Delta:
    """Look at a sample's newest token: what text is now certain, and has it ended?"""
    config = state.config
    at_end = state.ids[-1] in lm.end_ids
    text = state.written.of(lm, state.ids[:-1] if at_end else state.ids)
    begin = _behind(text, config.answer_prefix)
    cuts = [at for s in config.stop if (at := text.find(s, begin)) >= 0]
    finish = "stop" if at_end or cuts else "length" if len(state.ids) >= state.room else None
    if cuts:
        text = text[: min(cuts)]
    if finish:
        certain = len(text)
    elif begin < len(config.answer_prefix) and config.answer_prefix.startswith(text):
        certain = state.shown  # the prefix may still come: where stops are looked for is not known
    else:
        certain = begin + _certain(text[begin:], config.stop)
    new = text[state.shown : certain]
    state.shown = max(state.shown, certain)
    ended = None
    if finish:
        noted = tuple(state.logprobs), tuple(state.top)
        ended = Completion(text, state.ids, state.logprob, finish, *noted)
    return Delta(state.row, state.sample, new, ended)


def _behind(text: str, prefix: str) -> int:
    """Return where an answer begins behind its prefix; at its end while that may still come."""
    if text.startswith(prefix):
        return len(prefix)
    return len(text) if prefix.startswith(text) else 0


def _certain(text: str, stop: Sequence[str]) -> int:
    """Return how much of `text` later tokens cannot change.

    Held back: half a UTF-8 character, and an ending that may grow into a stop string.
    """
    text = text.rstrip("\ufffd")
    end = len(text)
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:size]):
                end = min(end, len(text) - size)
                break
    return end
