"""One pass over whole rows: embeddings in, hidden states of their positions out, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoulders.lm.combine import check_window, combine_embedded
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.pack import can_pack, pack
from shoulders.lm.prompt import Prompt
from shoulders.lm.reading import begun


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of rows, with those of prompts and pads among them.

    Attributes:
        values: `[m, d]` after the final norm; with `k` taps `[k, m, d]`.
        starts: where in `m` each row's first token stands; its others follow.
    """

    values: Tensor
    starts: list[int]


def states(
    lm: FrozenLM,
    prompt: Prompt,
    embedded: Tensor,
    counts: Sequence[int],
    *,
    taps: Sequence[int] = (),
    recompute: bool = False,
) -> States:
    """Read `b` rows of `[prompt ; embeddings]`.

    Args:
        lm: the frozen LM.
        prompt: one per row.
        embedded: `[t, d]`, embeddings of all rows end to end.
        counts: how many each row has.
        taps: layers whose states are wanted, see `FrozenLM.hidden`.
        recompute: save memory, see `shoulders.lm.fused.Blocks.hidden`.

    Raises:
        WindowError: a row is longer than the LM's window, or empty.
    """
    if lm.blocks is not None and lm.blocks.fits(prompt) and can_pack(lm, prompt, counts):
        check_window(lm, prompt, np.array(counts))
        rows = lm.blocks.pack(prompt, embedded, counts)
        return States(lm.blocks.hidden(rows, recompute=recompute, taps=taps), rows.first_token)
    if lm.blocks is not None and not torch.is_grad_enabled() and can_pack(lm, prompt, counts):
        # Prompts of several lengths: a row is read by the same layers whatever stands beside it.
        check_window(lm, prompt, np.array(counts))
        read = begun(lm, prompt, embedded, counts, 0, taps).states
        return States(read, [0, *np.cumsum(counts)[:-1].tolist()])
    if can_pack(lm, prompt, counts):
        row = pack(lm, prompt, embedded, counts)
        values = lm.hidden(
            row.embeddings, row.mask, row.positions, row.cache, taps, prompt.updates, row.owner
        )
        return States(values[..., 0, :, :], row.first_token)
    batch = combine_embedded(lm, prompt, embedded, counts)
    values = lm.hidden(
        batch.embeddings, batch.mask, batch.positions, batch.cache, taps, prompt.updates
    )
    width = values.shape[-2]
    starts = [i * width + first for i, first in enumerate(batch.first_token.tolist())]
    return States(values.flatten(-3, -2), starts)
