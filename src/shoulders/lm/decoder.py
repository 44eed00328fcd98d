"""Tokens in, logits of the next token out: what generation chooses from.

Between token ids and the last pass stands a source of embeddings. A skill of one pass has the LM's
own table; in a recursion earlier passes write the embeddings (`shoulders.recursion.chain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.combine import check_window
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import begun


class Source(Protocol):
    """Writes the embeddings that a pass reads, for rows that grow token by token."""

    @property
    def lengths(self) -> Tensor | None:
        """Most positions that each row takes of an earlier pass, `[b]`; None without one."""
        ...

    def begin(self, token_ids: Sequence[Sequence[int]], room: int) -> Tensor:
        """Return the embeddings of `b` rows end to end, `[t, d]`; they may grow by `room`."""
        ...

    def append(self, tokens: Tensor) -> Tensor:
        """Return the embeddings `[b, d]` of one more token per row, `[b]`."""
        ...

    def repeat(self, n: int) -> None:
        """Make every row `n` rows that share what was read."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        ...


class TokenTable:
    """The LM's own embeddings: a source that remembers nothing."""

    lengths = None

    def __init__(self, lm: FrozenLM) -> None:
        self._lm = lm

    def begin(self, token_ids: Sequence[Sequence[int]], room: int) -> Tensor:  # noqa: ARG002
        """See `Source`."""
        return self.append(torch.tensor([i for ids in token_ids for i in ids]))

    def append(self, tokens: Tensor) -> Tensor:
        """See `Source`."""
        return self._lm.embed(tokens.to(self._lm.device))

    def repeat(self, n: int) -> None:
        """See `Source`."""

    def keep(self, rows: Tensor) -> None:
        """See `Source`."""


class Decoder:
    """Rows that are being generated.

    Attributes:
        logits: `[b, vocabulary]` float32 of each row's next token.

    Raises:
        WindowError: as `combine` does.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: FrozenLM,
        prompt: Prompt,
        token_ids: Sequence[Sequence[int]],
        room: int,
        source: Source | None = None,
    ) -> None:
        counts = [len(ids) for ids in token_ids]
        check_window(lm, prompt, np.array(counts))
        self._lm, self._source = lm, source or TokenTable(lm)
        embedded = self._source.begin(token_ids, room)
        self._reading = begun(lm, prompt, embedded, counts, room)
        self.logits = lm.logits(self._reading.states[torch.tensor(counts).cumsum(0) - 1])

    @property
    def lengths(self) -> Tensor:
        """Positions that each row takes so far, prompt and tokens: `[b]`, of its longest pass."""
        own, earlier = self._reading.lengths, self._source.lengths
        return own if earlier is None else torch.maximum(own, earlier)

    def repeat(self, n: int) -> None:
        """Make every row `n` rows that share what was read."""
        self._source.repeat(n)
        self._reading.repeat(n)
        self.logits = self.logits.repeat_interleave(n, 0)

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        self._source.keep(rows)
        self._reading.keep(rows)

    @torch.no_grad()
    def append(self, tokens: Tensor) -> None:
        """Read one token per row, `[b]`, and set the logits of the next."""
        self._reading.append(self._source.append(tokens))
        self.logits = self._lm.logits(self._reading.states)
