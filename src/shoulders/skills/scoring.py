"""Log-likelihood of candidate answers under a skill: rank classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from shoulders.data.batching import length_grouped
from shoulders.lm.score import Score, score, score_whole
from shoulders.skills.config import BATCH_ROWS, BATCH_TOKENS

if TYPE_CHECKING:
    from shoulders.skills.skill import Skill


def scored(
    skill: Skill,
    texts: Sequence[str],
    answers: Sequence[Sequence[str]],
    on_rows: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Return each text's candidates' scores, through the passes after the last text."""
    candidates = [skill.answer_ids(several) for several in answers]
    ids = skill.input_ids(texts, [max(map(len, row), default=1) for row in candidates])
    return scored_ids(skill, texts, ids, candidates, on_rows)


@torch.no_grad()
def scored_ids(
    skill: Skill,
    texts: Sequence[str],
    ids: Sequence[list[int]],
    candidates: Sequence[Sequence[list[int]]],
    on_rows: Callable[[int], None] | None = None,
    most: int = BATCH_ROWS,
) -> list[list[Score]]:
    """Return the scores of candidates in tokens.

    Args:
        skill: whose passes after the last text are used.
        texts: what producers read, one for each row.
        ids: what stands before a row's candidates.
        candidates: for each row, at least one id each.
        on_rows: told of each batch's rows.
        most: candidates that are computed together.
    """
    results: list[list[Score]] = [[] for _ in texts]
    width = max([1, *map(len, candidates)])
    # Continuations as long as a window (running text) count as what is read.
    lengths = [
        max(len(i), max((len(c) for c in own), default=0))
        for i, own in zip(ids, candidates, strict=True)
    ]
    for rows in length_grouped(lengths, BATCH_TOKENS, max(1, most // width)):
        own = [texts[i] for i in rows]
        asked, wanted = [ids[i] for i in rows], [candidates[i] for i in rows]
        if skill.parts.earlier or all(len(several) == 1 for several in wanted):
            found = _whole(skill, own, asked, wanted)
        else:
            found = score(skill.lm, skill.prompt(own), asked, wanted)
        for row, several in zip(rows, found, strict=True):
            results[row] = several
        if on_rows is not None:
            on_rows(len(rows))
    return results


def _whole(
    skill: Skill,
    texts: Sequence[str],
    ids: Sequence[list[int]],
    candidates: Sequence[Sequence[list[int]]],
) -> list[list[Score]]:
    """Score each candidate with all passes over the whole row.

    Links have no cache to share; a row with one candidate has nobody to share it with.
    """
    owner = [row for row, several in enumerate(candidates) for _ in several]
    flat = [own for several in candidates for own in several]
    rows = [ids[row] for row in owner]
    repeated = [texts[row] for row in owner]
    read = [i + c[:-1] for i, c in zip(rows, flat, strict=True)]
    embedded = skill.embedded(repeated, read)
    if embedded is None:  # no earlier passes
        embedded = skill.lm.embed_rows(read)
    found = score_whole(skill.lm, skill.prompt(repeated), embedded, rows, flat)
    results: list[list[Score]] = [[] for _ in texts]
    for row, one in zip(owner, found, strict=True):
        results[row].append(one)
    return results
