"""Several readings of every row that choose each next token together: an ensemble in one batch.

The members of an ensemble share the frozen LM, so that they are rows of one batch, which reads the
weights once for all of them (prompt ensembling, Lester et al. 2021, arXiv 2104.08691). They choose
from the mean of their distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from shoulders.lm.decoder import Decoder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt


def mixed(logits: Tensor, members: int) -> Tensor:
    """Return the log of the members' mean distribution, `[b, vocabulary]` float32.

    Args:
        logits: `[members * b, vocabulary]`, one member's rows after the other's.
        members: how many; one gives its logits back.
    """
    if members == 1:
        return logits
    each = torch.log_softmax(logits.float().unflatten(0, (members, -1)), -1)
    return each.logsumexp(0) - math.log(members)


class Together:
    """Rows that are being generated, each read by every member; see `shoulders.lm.decoder`.

    Args:
        lm: the frozen LM.
        prompts: one of `b` rows for each member.
        token_ids: each member's `b` rows: members may read a text in different formats.
        room: tokens that rows may grow by.

    Raises:
        WindowError: as `combine` does; rows are counted through all members.
    """

    def __init__(
        self,
        lm: FrozenLM,
        prompts: Sequence[Prompt],
        token_ids: Sequence[Sequence[Sequence[int]]],
        room: int,
    ) -> None:
        self._members = len(prompts)
        rows = [ids for own in token_ids for ids in own]
        self._decoder = Decoder(lm, Prompt.stack(prompts), rows, room)
        self.logits = mixed(self._decoder.logits, self._members)

    @property
    def lengths(self) -> Tensor:
        """Positions that a row takes so far with the member that reads most, `[b]`."""
        return self._decoder.lengths.unflatten(0, (self._members, -1)).amax(0)

    def repeat(self, n: int) -> None:
        """Make every row `n` rows that share what was read."""
        self._decoder.repeat(n)
        self.logits = self.logits.repeat_interleave(n, 0)

    def keep(self, rows: Tensor) -> None:
        """Let all rows leave but these (int64 indices)."""
        b = len(self._decoder.lengths) // self._members
        firsts = torch.arange(self._members, device=rows.device)[:, None] * b
        self._decoder.keep((firsts + rows).flatten())

    def append(self, tokens: Tensor) -> None:
        """Read one token per row, `[b]`, and set the logits of the next."""
        self._decoder.append(tokens.repeat(self._members))
        self.logits = mixed(self._decoder.logits, self._members)
