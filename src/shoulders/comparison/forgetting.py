"""What tuning made an LM forget: perplexity of running text, and zero-shot scores elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoulders.comparison.parts import ForgettingConfig
from shoulders.data.rows import Row
from shoulders.data.templates import Templates
from shoulders.evaluation.evaluate import evaluate
from shoulders.files import write_text
from shoulders.lm.decode import DecodingConfig
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import SkillConfig, TextFormat
from shoulders.skills.skill import Skill
from shoulders.training.running_text import RunningText, perplexity

OWN = "own_text.txt"
OPENINGS = ("The", "In", "When", "A", "It was", "There are", "Most people", "On Monday")
SAMPLES, WRITTEN = 4, 96  # texts of each opening, tokens of each text


def examined(
    lm: FrozenLM, config: ForgettingConfig, text: Sequence[str], rows: Sequence[Row]
) -> dict[str, Any]:
    """Return an LM's perplexity on text, and its zero-shot exact match on rows of other tasks.

    Args:
        lm: the LM before or after tuning.
        config: how much is read.
        text: UTF-8 files.
        rows: asked through the chat template, where it has one; may be empty.
    """
    base = Skill.base(lm, SkillConfig())
    read = RunningText(lm, list(text), config.chunk).examples(config.chunks)
    found: dict[str, Any] = {"perplexity": perplexity(base, read).value}
    if rows:
        scores = evaluate(Skill.base(lm), rows, Templates())
        found["zero_shot"] = scores.metrics["exact_match"]
    return found


def text_of(lm: FrozenLM, config: ForgettingConfig, out: Path) -> list[str]:
    """Return the files to read: those of the plan, or what the LM writes itself, kept in `out`.

    An LM's own samples are what it was: a copy that finds them less likely has moved away from it.
    """
    if config.text:
        return list(config.text)
    file = out / OWN
    if not file.is_file():
        plain = SkillConfig(format=TextFormat(separator=""))
        decoding = DecodingConfig(max_new_tokens=WRITTEN, n=SAMPLES, temperature=1.0)
        written = Skill.base(lm, plain).generate(list(OPENINGS), decoding)
        texts = [o + c.text for o, own in zip(OPENINGS, written, strict=True) for c in own]
        write_text(file, "\n\n".join(texts) + "\n")
    return [str(file)]
