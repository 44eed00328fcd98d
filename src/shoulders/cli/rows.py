"""`shoulders eval SKILL_DIR|base --data ROWS`: exact match and F1, by task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.table import Table

from shoulders.cli.common import emit_json, gated, open_skill, provenance, stderr, stdout
from shoulders.cli.options import LMChoice
from shoulders.cli.remote import through

if TYPE_CHECKING:
    from shoulders.data.rows import Row
    from shoulders.evaluation.evaluate import Evaluation


def evaluate_rows(
    name: str,
    data: Path,
    choice: LMChoice,
    *,
    templates: Path | None,
    limit: int | None,
    json: Path | None,
    dump: Path | None,
    normalizer: Literal["general", "squad"],
    max_new_tokens: int,
    keep: str | None,
    recurse_below: float | None,
    vllm_url: str | None,
    vllm_api_key_file: Path | None,
) -> None:
    """Answer a file's rows with a skill and score them; see `evaluate` for the options."""
    from shoulders.data.rows import read_rows
    from shoulders.evaluation import evaluate as evaluation
    from shoulders.progress import quiet_progress

    rows = spread(read_rows(data), limit)
    opened, own = open_skill(name, choice, templates=templates, remote=vllm_url is not None)
    if keep is not None:
        opened = opened.keeping(keep)
    behind = gated(opened, name, recurse_below)
    decoding = evaluation.EVALUATION_DECODING.model_copy(update={"max_new_tokens": max_new_tokens})
    with (
        through(behind, vllm_url, vllm_api_key_file) as answering,
        quiet_progress(stderr(), "evaluating", len(rows)) as advance,
    ):
        result = evaluation.evaluate(
            answering, rows, own, decoding=decoding, normalizer=normalizer, on_rows=advance
        )
    recursed: dict[str, Any] = {}
    if recurse_below is not None:
        share = getattr(behind, "recursed", 0) / max(1, len(rows))
        recursed = {"recurse_below": recurse_below, "recursed": share}
        stdout().print(f"recursed on {share:.0%} of the rows")
    if dump is not None:
        evaluation.dump_predictions(dump, result.predictions)
    emit_json(
        json,
        {
            **provenance(opened, name, data),
            **result.as_dict(),
            "normalizer": normalizer,
            "max_new_tokens": max_new_tokens,
            "keep": keep,
            "limit": limit,
            "templates": None if templates is None else str(templates),
            **recursed,
        },
    )
    stdout().print(results_table(f"{name} on {data.name}", result))


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    """Return at most `limit` rows, one task after the other in turn, in file order."""
    if limit is None or limit >= len(rows):
        return rows
    turn: dict[str, int] = {}
    ranked = []
    for place, row in enumerate(rows):
        turn[row.task] = turn.get(row.task, 0) + 1
        ranked.append((turn[row.task], place))
    return [rows[place] for place in sorted(place for _, place in sorted(ranked)[:limit])]


def results_table(title: str, result: Evaluation) -> Table:
    """Return the scores by task and their macro average as a table."""
    names = list(result.metrics)
    table = Table(title=escape(title), title_justify="left")
    table.add_column("task")
    table.add_column("rows", justify="right")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for task, scores in result.tasks.items():
        table.add_row(escape(task), str(int(scores["n"])), *(_number(scores.get(n)) for n in names))
    table.add_section()
    intervals = [
        f"{result.metrics[n]:.1f} [{result.ci95[n][0]:.1f}, {result.ci95[n][1]:.1f}]" for n in names
    ]
    table.add_row("macro average, 95%", str(result.n), *intervals, style="bold")
    return table


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"
