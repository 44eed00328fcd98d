"""Fitting the gate of a recursive skill on validation rows."""

from __future__ import annotations

from collections.abc import Sequence

from shoulders.data.rows import Row
from shoulders.evaluation.evaluate import EVALUATION_DECODING
from shoulders.evaluation.metrics import exact_match, normalize
from shoulders.reader.calibration import Platt
from shoulders.skills.gate import direct, fitted_gate
from shoulders.skills.reader import first_line
from shoulders.skills.skill import Skill


def gate_of(skill: Skill, checked: Sequence[tuple[Row, str]]) -> Platt | None:
    """Fit when a skill's direct answer is good enough; None for one pass, or too little to fit.

    Args:
        skill: trained.
        checked: validation rows with their texts.
    """
    if len(skill.config.passes) == 1 or not checked:
        return None
    answers = direct(skill).generate([text for _, text in checked], EVALUATION_DECODING)
    completions = [several[0] for several in answers]
    right = [
        exact_match(first_line(c.text), row.targets, normalize) == 1
        for c, (row, _) in zip(completions, checked, strict=True)
    ]
    return fitted_gate(completions, right)
