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


@torch.no_grad()
def scored(
    skill: Skill,
    texts: Sequence[str],
    answers: Sequence[Sequence[str]],
    on_rows: Callable[[int], None] | None = None,
) -> list[list[Score]]:
    """Return each text's candidates' scores, through the passes after the last text."""
    candidates = [skill.answer_ids(several) for several in answers]
    longest = max((len(c) for row in candidates for c in row), default=1)
    ids = skill.input_ids(texts, answer_room=longest)
    results: list[list[Score]] = [[] for _ in texts]
    width = max((len(row) for row in candidates), default=1)
    lengths = [len(i) for i in ids]
    for rows in length_grouped(lengths, BATCH_TOKENS, max(1, BATCH_ROWS // width)):
        own = [texts[i] for i in rows]
        asked, wanted = [ids[i] for i in rows], [candidates[i] for i in rows]
        if skill.parts.earlier:
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
    """Score each candidate with all passes over the whole row: links have no cache to share."""
    owner = [row for row, several in enumerate(candidates) for _ in several]
    flat = [own for several in candidates for own in several]
    rows = [ids[row] for row in owner]
    repeated = [texts[row] for row in owner]
    read = [i + c[:-1] for i, c in zip(rows, flat, strict=True)]
    embedded = skill.embedded(repeated, read)
    assert embedded is not None  # there are earlier passes
    found = score_whole(skill.lm, skill.prompt(repeated), embedded, rows, flat)
    results: list[list[Score]] = [[] for _ in texts]
    for row, one in zip(owner, found, strict=True):
        results[row].append(one)
    return results
