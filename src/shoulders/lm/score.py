"""Log-likelihood of given continuations: rank classification and re-ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoulders.errors import WindowError
from shoulders.lm.combine import combine
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states
from shoulders.lm.together import mixed

POSITIONS = 512  # whose logits are held at once


@dataclass(frozen=True, slots=True)
class Score:
    """Natural-log likelihood of a continuation (sum over its tokens) and its token count.

    `greedy` tells whether each of its tokens is the LM's first choice.
    """

    logprob: float
    tokens: int
    greedy: bool = False

    @property
    def mean(self) -> float:
        """Log-likelihood per token, in nats."""
        return self.logprob / self.tokens


@torch.no_grad()
def score(
    lm: FrozenLM,
    prompt: Prompt,
    token_ids: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
) -> list[list[Score]]:
    """Score several continuations of each row; the row itself is computed only once.

    Args:
        lm: the frozen LM.
        prompt: `b` prompts.
        token_ids: `b` rows of input ids.
        continuations: for each row, its candidate continuations (at least one id each).

    Raises:
        WindowError: a row with its longest continuation does not fit the window.
    """
    flat = [list(c) for row in continuations for c in row]
    if not flat:
        return [[] for _ in continuations]
    if any(not c for c in flat):
        raise WindowError("a continuation to score has no tokens")
    batch = combine(lm, prompt, token_ids, pad="left", keep_cache=True)
    cache = batch.cache
    assert cache is not None  # keep_cache
    updates = prompt.updates
    hidden = lm.hidden(batch.embeddings, batch.mask, batch.positions, cache, updates=updates)
    logits = lm.logits(hidden[:, -1])
    first, first_choice = torch.log_softmax(logits, -1), logits.argmax(-1)

    owner = torch.tensor(
        [row for row, several in enumerate(continuations) for _ in several], device=lm.device
    )
    lengths = torch.tensor([len(c) for c in flat], device=lm.device)
    total = batch.lengths[owner] + lengths - 1  # the last token is not read
    if int(total.max()) > lm.max_positions:
        row = int(owner[int(total.argmax())])
        raise WindowError(f"row {row + 1} with its continuation takes {int(total.max())} positions")
    ids = torch.zeros(len(flat), int(lengths.max()), dtype=torch.long, device=lm.device)
    for i, continuation in enumerate(flat):
        ids[i, : len(continuation)] = torch.tensor(continuation, device=lm.device)
    real = torch.arange(ids.shape[1], device=lm.device) < lengths[:, None]
    # The token before position 0 of a continuation is the row's last: its logits are `first`.
    token_logprobs = torch.zeros(ids.shape, device=lm.device)
    token_logprobs[:, 0] = first[owner, ids[:, 0]]
    chosen = torch.ones_like(real)
    chosen[:, 0] = first_choice[owner] == ids[:, 0]
    if ids.shape[1] > 1:
        cache.batch_select_indices(owner)
        mask = torch.cat([batch.mask[owner], real[:, :-1].long()], 1)
        steps = torch.arange(ids.shape[1] - 1, device=lm.device)
        positions = (batch.lengths[owner][:, None] + steps) * real[:, :-1]
        if updates is not None:
            updates = updates.select(owner.tolist())
        hidden = lm.hidden(lm.embed(ids[:, :-1]), mask, positions, cache, updates=updates)
        at = real[:, 1:]
        token_logprobs[:, 1:][at], chosen[:, 1:][at] = _judged(lm, hidden[at][None], ids[:, 1:][at])
    sums = (token_logprobs * real).sum(1).tolist()
    greedy = (chosen | ~real).all(1).tolist()
    results: list[list[Score]] = [[] for _ in continuations]
    for row, *values in zip(owner.tolist(), sums, lengths.tolist(), greedy, strict=True):
        results[row].append(Score(*values))
    return results


@torch.no_grad()
def score_whole(
    lm: FrozenLM,
    prompt: Prompt,
    embedded: Tensor,
    token_ids: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    members: int = 1,
) -> list[Score]:
    """Score one continuation of each row, the row computed with it.

    Args:
        lm: the frozen LM.
        prompt: `b` prompts.
        embedded: `[t, d]`, what stands for each row's ids and its continuation but the last id.
        token_ids: `b` rows of input ids.
        continuations: one for each, at least one id long.
        members: of an ensemble, whose rows follow each other, one member's after the other's (see
            `shoulders.lm.together`): they judge together, and a row of each is scored once.
    """
    counts = [len(i) + len(c) - 1 for i, c in zip(token_ids, continuations, strict=True)]
    read = states(lm, prompt, embedded, counts)
    places = [
        start + len(ids) - 1 + k
        for start, ids, own in zip(read.starts, token_ids, continuations, strict=True)
        for k in range(len(own))
    ]
    hidden = read.values[torch.tensor(places, device=lm.device)].unflatten(0, (members, -1))
    scored = continuations[: len(continuations) // members]
    wanted = torch.tensor([i for own in scored for i in own], device=lm.device)
    logprobs, chosen = _judged(lm, hidden, wanted)
    lengths = [len(own) for own in scored]
    both = zip(logprobs.split(lengths), chosen.split(lengths), strict=True)
    return [Score(float(own.sum()), len(own), bool(first.all())) for own, first in both]


def _judged(lm: FrozenLM, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return tokens' log-likelihoods, and whether each is the first choice; both `[n]`.

    `hidden` is `[members, n, d]`. Some positions at a time: a whole window's logits take gigabytes.
    """
    logprobs, chosen = [], []
    members = len(hidden)
    at_once = max(1, POSITIONS // members)
    for own, ids in zip(hidden.split(at_once, 1), wanted.split(at_once), strict=True):
        logits = mixed(lm.logits(own.flatten(0, 1)), members)
        values = logits.gather(1, ids[:, None])[:, 0]
        logprobs.append(values - logits.logsumexp(-1))
        chosen.append(logits.argmax(-1) == ids)
    return torch.cat(logprobs), torch.cat(chosen)
