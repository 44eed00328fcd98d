"""Rows to measure on: a user's file, or the demo's own tasks."""

from __future__ import annotations

from pathlib import Path

from shoulders.data.mixture import Mixture, MixtureConfig
from shoulders.data.rows import Row, read_rows
from shoulders.data.templates import Templates
from shoulders.demo.tasks import demo_rows
from shoulders.skills.config import TextFormat


def benchmark_rows(
    data: Path | None, templates: Path | None, count: int, seed: int = 0
) -> list[dict[str, str]]:
    """Return `count` rows in the order in which training would draw them.

    Each has `input` (as templates render it) and `target`; and `text` and `answer`, the same with
    separator and prefix, as the LM reads them.
    """
    rows: list[Row] = read_rows(data) if data else demo_rows(seed)[0]
    rendering = Templates.read(templates) if templates else Templates()
    config = MixtureConfig(train=[str(data or "demo")], temperature=3)
    mixture, form = Mixture(rows, rendering, config, seed), TextFormat()
    chosen = []
    for position in range(count):
        row, text = mixture.example(position)
        target = row.targets[0]
        chosen.append(
            {
                "input": text,
                "target": target,
                "text": text + form.separator,
                "answer": form.answer_prefix + target,
            }
        )
    return chosen
