"""`shoulders eval SKILL_DIR|base --data FILE.txt`: how well running text is predicted."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from shoulders.cli.common import emit_json, one_skill, open_skill, provenance, stderr, stdout
from shoulders.cli.options import LMChoice
from shoulders.errors import DataError, ShouldersError


def evaluate_text(
    name: str,
    data: Path,
    *,
    chunk: int,
    limit: int | None,
    json: Path | None,
    choice: LMChoice,
) -> None:
    """Measure perplexity on a text file, in chunks of so many tokens; `limit` counts chunks."""
    from shoulders.progress import quiet_progress
    from shoulders.training.running_text import RunningText, perplexity

    if not data.is_file():  # before a minute's loading
        raise DataError(f"{data}: no such file")
    opened, _ = open_skill(name, choice)
    skill = one_skill(opened, name)
    most = skill.lm.max_positions
    if most is not None and chunk > (room := most - skill.prompt_length):
        raise ShouldersError(f"--chunk {chunk}: with its prompt the LM reads {room} tokens at most")
    if skill.proposals is not None:
        raise ShouldersError(f"{name}: answers inputs by proposing text; it predicts no text")
    text = RunningText(skill.lm, [str(data)], chunk)
    examples = text.examples(limit)
    with quiet_progress(stderr(), "reading", len(examples)) as advance:
        found = perplexity(skill, examples, on_rows=advance)
    emit_json(
        json,
        {
            **provenance(skill, name, data),
            "n": len(examples),
            "chunk": chunk,
            "metrics": {"perplexity": found.value, "loss": found.loss},
            "tokens": found.tokens,
        },
    )
    stdout().print(
        f"{escape(f'{name} on {data.name}')}: perplexity [bold]{found.value:.3f}[/] "
        f"over {found.tokens:,} tokens in chunks of {chunk}"
    )
