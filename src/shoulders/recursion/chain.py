"""Neural recursion: pass -> link -> pass, as a source of embeddings for the last pass.

`LM -> Connector -> LM` (arXiv 2204.10019) is the last pass reading other embeddings than the LM's
own: those that earlier passes write. Training asks for them whole rows at a time (`embeddings`),
generation token by token (`Hops`), each pass and each link with a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import Reading, begun
from shoulders.lm.states import states
from shoulders.recursion.memory import Memory


class Link(Protocol):
    """A `torch.nn.Module`: states of a pass -> embeddings for the next one.

    Attributes:
        taps: the LM's layers that it reads, see `FrozenLM.hidden`; none for the last states.
    """

    taps: tuple[int, ...]

    def __call__(self, states: Tensor, embeddings: Tensor, memory: Memory | None = None) -> Tensor:
        """Map `[b, s, d]` states and token embeddings to `[b, s, d]` embeddings, causally."""
        ...


class Hop(NamedTuple):
    """An earlier pass: its rows' prompts, and the link that carries its states on."""

    prompt: Prompt
    link: Link


FirstStates = Callable[[Sequence[Sequence[int]]], Tensor]
"""Rows of token ids -> states of a first pass without prompt, `[t, d]` (or `[k, t, d]`)."""


def embeddings(
    lm: FrozenLM,
    hops: Sequence[Hop],
    token_ids: Sequence[Sequence[int]],
    *,
    first: FirstStates | None = None,
    recompute: bool = False,
) -> Tensor:
    """Return what the last pass reads, rows end to end, `[t, d]`; gradients reach every hop.

    Args:
        lm: the frozen LM.
        hops: the earlier passes in order.
        token_ids: `b` rows.
        first: has the first pass's states, where that pass is without a prompt.
        recompute: save memory, see `shoulders.lm.fused.Blocks.hidden`.
    """
    counts = [len(ids) for ids in token_ids]
    tokens = lm.embed_rows(token_ids)
    current = tokens
    for number, hop in enumerate(hops):
        if number == 0 and first is not None:
            values = first(token_ids)
        else:
            read = states(lm, hop.prompt, current, counts, taps=hop.link.taps, recompute=recompute)
            values = _tokens_of(read.values, read.starts, counts)
        current = carried(hop.link, values, tokens, counts)
    return current


def carried(
    link: Link,
    values: Tensor,
    tokens: Tensor,
    counts: Sequence[int],
    memory: Memory | None = None,
) -> Tensor:
    """Return a link's embeddings `[t, d]` of rows that lie end to end."""
    if len(set(counts)) == 1:
        shape = (len(counts), counts[0])
        out = link(values.unflatten(-2, shape), tokens.unflatten(0, shape), memory)
        flat = out.flatten(0, 1)
    else:
        b, s = len(counts), max(counts)
        lengths = torch.tensor(counts, device=values.device)
        starts = lengths.cumsum(0) - lengths
        row = torch.arange(b, device=values.device).repeat_interleave(lengths)
        place = torch.arange(len(row), device=values.device) - starts[row]
        padded = values.new_zeros(*values.shape[:-2], b, s, values.shape[-1])
        padded[..., row, place, :] = values
        spread = tokens.new_zeros(b, s, tokens.shape[-1])
        spread[row, place] = tokens
        flat = link(padded, spread, memory)[row, place]
    if memory is not None:
        memory.seen(torch.tensor(counts, device=values.device))
    return flat


class Hops:
    """Earlier passes as the source of a decoder; see `shoulders.lm.decoder.Source`."""

    def __init__(self, lm: FrozenLM, hops: Sequence[Hop]) -> None:
        self._lm, self._hops = lm, hops
        self._readings: list[Reading] = []
        self._memories: list[Memory] = []

    @torch.no_grad()
    def begin(self, token_ids: Sequence[Sequence[int]], room: int) -> Tensor:
        """See `Source`."""
        counts = [len(ids) for ids in token_ids]
        current = tokens = self._lm.embed_rows(token_ids)
        for hop in self._hops:
            reading = begun(self._lm, hop.prompt, current, counts, room, hop.link.taps)
            memory = Memory(len(counts), self._lm.device)
            current = carried(hop.link, reading.states, tokens, counts, memory)
            self._readings.append(reading)
            self._memories.append(memory)
        return current

    @property
    def lengths(self) -> Tensor | None:
        """See `Source`."""
        lengths = [reading.lengths for reading in self._readings]
        return torch.stack(lengths).amax(0) if lengths else None

    @torch.no_grad()
    def append(self, tokens: Tensor) -> Tensor:
        """See `Source`."""
        embedded = self._lm.embed(tokens)
        current, ones = embedded, [1] * len(tokens)
        for hop, reading, memory in zip(self._hops, self._readings, self._memories, strict=True):
            reading.append(current)
            current = carried(hop.link, reading.states, embedded, ones, memory)
        return current

    def repeat(self, n: int) -> None:
        """See `Source`."""
        for reading, memory in zip(self._readings, self._memories, strict=True):
            reading.repeat(n)
            memory.repeat(n)

    def keep(self, rows: Tensor) -> None:
        """See `Source`."""
        for reading, memory in zip(self._readings, self._memories, strict=True):
            reading.keep(rows)
            memory.keep(rows)


def _tokens_of(values: Tensor, starts: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Take the rows' tokens out of states that hold prompts and pads as well, end to end."""
    places = [i for s, n in zip(starts, counts, strict=True) for i in range(s, s + n)]
    return values[..., torch.tensor(places, device=values.device), :]
