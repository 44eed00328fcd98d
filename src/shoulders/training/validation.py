"""Validation during training: cheap, on a fixed choice of rows, never on a test split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from shoulders.data.batching import length_grouped
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.errors import TrainingError
from shoulders.evaluation.evaluate import evaluate
from shoulders.skills.config import BATCH_ROWS, BATCH_TOKENS
from shoulders.skills.skill import Skill
from shoulders.training.configs import Select
from shoulders.training.objective import Example
from shoulders.training.step import losses_of

SELECTING, LEAST = 200, 8  # rows in all, and of each task, where nothing is said


def choose_rows(rows: Sequence[Row], per_task: int | None) -> list[Row]:
    """Return at most `per_task` rows of each task, chosen by a hash of their content.

    The same rows for every method and seed, wherever they stand in the file. Without a number,
    so many of each that they come to `SELECTING`, but `LEAST` of each.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.task, []).append(row)
    if per_task is None:
        per_task = max(LEAST, -(-SELECTING // max(1, len(groups))))

    def place(row: Row) -> str:
        return hashlib.sha256(f"{row.task}\n{row.input}".encode()).hexdigest()

    return [row for task in sorted(groups) for row in sorted(groups[task], key=place)[:per_task]]


def check_selectable(select: Select, rows: Sequence[object]) -> None:
    """Raise `TrainingError` where weights are to be selected by answers, and no rows are left."""
    if select == "exact_match" and not rows:
        raise TrainingError(
            "training.select: exact_match needs validation rows that are not trained on as well"
        )


@torch.no_grad()
def validate(
    skill: Skill,
    rows: Sequence[Row],
    templates: Templates,
    examples: Sequence[Example],
    select: Select,
) -> dict[str, float]:
    """Return `loss` (nats per answer token, averaged by task), and `exact_match` if selected.

    Where the LM is sharded every process has to come here, and none leaves another alone with it.
    """
    sums: dict[str, list[float]] = {}
    lengths = [e.tokens for e in examples]
    for batch in length_grouped(lengths, BATCH_TOKENS, BATCH_ROWS):
        part = [examples[i] for i in batch]
        losses = losses_of(skill, part)
        per_row = losses.split([len(e.answer_ids) for e in part])
        for example, values in zip(part, per_row, strict=True):
            sums.setdefault(example.task, []).append(float(values.mean()))
    skill.lm.settle()
    entry = {"loss": sum(sum(v) / len(v) for v in sums.values()) / len(sums)}
    if select == "exact_match":
        found = evaluate(skill, rows, templates, rank=False)
        entry["exact_match"] = found.metrics["exact_match"]
        skill.lm.settle()
    return entry
