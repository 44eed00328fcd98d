"""The LM alone: what every method must beat, at no training at all."""

from __future__ import annotations

from shoulders.comparison.methods import Method
from shoulders.comparison.plan import Plan
from shoulders.comparison.rows import Rows
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import SkillConfig
from shoulders.skills.skill import Skill
from shoulders.training.validation import choose_rows


def bare(method: Method, lm: FrozenLM, plan: Plan, rows: Rows) -> tuple[Skill, list[str]]:
    """Return the LM alone and the texts that it is asked.

    Zero-shot goes through its chat template, where it has one; few-shot shows worked examples of
    the same task in the plain format, as many as asked for and as fit its window.
    """
    texts = [rows.templates.render(row, 0) for row in rows.test]
    if method.name == "zero_shot":
        return Skill.base(lm), texts
    skill = Skill.base(lm, SkillConfig())
    form = skill.config.format
    room = skill.input_room(plan.max_new_tokens)
    shown: dict[str, list[str]] = {}
    for row in choose_rows(rows.train, plan.shots):
        worked = rows.templates.render(row, 0) + form.separator + form.answer_prefix
        shown.setdefault(row.task, []).append(worked + row.targets[0] + "\n\n")
    asked = []
    for row, text in zip(rows.test, texts, strict=True):
        examples = shown.get(row.task, [])
        while examples and skill.count_tokens("".join(examples) + text) > room:
            examples = examples[1:]
        asked.append("".join(examples) + text)
    return skill, asked
