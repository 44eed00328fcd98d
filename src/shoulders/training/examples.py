"""Rows into tokens to train on, and whether those that will be drawn fit into the LM's window."""

from __future__ import annotations

import numpy as np

from shoulders.data.mixture import Mixture
from shoulders.data.rows import Row
from shoulders.errors import WindowError
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example
from shoulders.training.running_text import RunningText

MOST = 20_000  # draws that are looked at ahead: seconds, if all of them are long


def example_at(skill: Skill, mixture: Mixture | RunningText, position: int, seed: int) -> Example:
    """Return the example at a position of the mixture; of several right answers, one by seed."""
    if isinstance(mixture, RunningText):
        return mixture.example(position)
    row, text = mixture.example(position)
    return example_of(skill, row, text, np.random.PCG64([seed, position]).random_raw() >> 1)


def example_of(skill: Skill, row: Row, text: str, which: int) -> Example:
    """Turn a row and its rendered text into tokens; answer number `which` (modulo) is taught."""
    answer = skill.answer_ids([row.targets[int(which) % len(row.targets)]])[0]
    try:
        ids = skill.input_ids([text], answer_room=len(answer))[0]
    except WindowError as error:
        place = row.where or "a row"
        raise WindowError(f"{place}, task '{row.task}' {error.reason}", text=text) from None
    return Example(text=text, input_ids=ids, answer_ids=answer, task=row.task)


def check_window(skill: Skill, mixture: Mixture, positions: range, seed: int) -> None:
    """Raise `WindowError`, naming the row, for one that will not fit when it is drawn.

    Hours later its run would be lost: neither with a shorter row nor with another format is it the
    run that was begun. A token is a byte at least, so that only long rows are cut into tokens.
    """
    form = skill.config.format
    room = skill.input_room(0)
    for position in positions[:MOST]:
        row, text = mixture.example(position)
        read = 1 if form.keep is not None else _bytes(text)
        if read + max(_bytes(form.answer_prefix + target) for target in row.targets) + 1 > room:
            example_at(skill, mixture, position, seed)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
