"""`shoulders eval SKILL_DIR|base --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoulders.cli import options, readers
from shoulders.cli.common import (
    check_outputs,
    emit_json,
    files_of,
    gated,
    note_given,
    open_skill,
    provenance,
    stderr,
    stdout,
)
from shoulders.cli.perplexity import evaluate_text
from shoulders.cli.remote import through
from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.data.rows import Row
    from shoulders.evaluation.evaluate import Evaluation

# What each kind of data alone takes, see `_unused`.
_OF_READERS = ("retriever", "k", "window", "no_rerank", "abstain_below", "contexts", "plot")
_OF_ROWS = ("templates", "normalizer", "max_new_tokens", "keep", "recurse_below")


def evaluate(
    context: typer.Context,
    skill: Annotated[
        str, typer.Argument(help="A skill's or ensemble's folder, or 'base': the bare LM.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            help="Rows with targets (.jsonl, .parquet); for a reader, questions; running text "
            "(.txt) for its perplexity."
        ),
    ],
    index: Annotated[
        str | None,
        typer.Option(help="Readers: the index, or LanceDB, to search. Without it: `ctxs`."),
    ] = None,
    retriever: Annotated[
        str | None,
        typer.Option(help="Readers: sparse, dense, approximate or hybrid. Default: its own."),
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Readers: passages to retrieve.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Readers: most tokens of passages.")
    ] = None,
    no_rerank: Annotated[
        bool, typer.Option("--no-rerank", help="Readers: keep the retriever's order.")
    ] = False,
    abstain_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Readers: withhold answers less likely right than this."),
    ] = None,
    contexts: Annotated[
        Path | None, typer.Option(help="Readers: write the passages found, as FiD and DPR do.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Readers: draw the stages (PNG).")] = None,
    templates: options.TemplateFile = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most this many rows, spread over the tasks.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=2, help="Running text: tokens read at once.")] = 128,
    json: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
    dump: Annotated[Path | None, typer.Option(help="Write every row's answer, JSONL.")] = None,
    normalizer: Annotated[
        str, typer.Option(help="What exact match compares: general or squad.")
    ] = "general",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    keep: options.Keep = None,
    recurse_below: options.RecurseBelow = None,
    lm: options.LMName = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    vllm_url: options.VllmURL = None,
    vllm_api_key_file: options.VllmKeyFile = None,
) -> None:
    """Score a skill on data: exact match and F1 by task, with 95% bootstrap intervals."""
    from shoulders.data.rows import read_rows
    from shoulders.evaluation import evaluate as evaluation
    from shoulders.progress import quiet_progress

    if normalizer not in ("general", "squad"):
        raise ShouldersError(f"--normalizer {normalizer}: use general or squad")
    reads = index is not None or readers.is_reader(skill)
    if vllm_url is not None and (recurse_below is not None or reads or data.suffix == ".txt"):
        raise ShouldersError("--vllm-url: readers, running text and --recurse-below are asked here")
    _unused(context, skill, reads=reads, text=data.suffix == ".txt")
    check_outputs(json, dump, contexts, plot, read=[data, templates, *files_of(skill)])
    choice = options.LMChoice(lm, dtype, quantize, device_map)
    if reads:
        reader = readers.open_reader(
            skill,
            index,
            retriever=retriever,
            k=k,
            window=window,
            rerank=not no_rerank,
            abstain_below=abstain_below,
            choice=choice,
        )
        readers.evaluate_reader(
            reader,
            skill,
            index,
            data,
            limit=limit,
            json=json,
            dump=dump,
            contexts=contexts,
            plot=plot,
        )
        return
    if data.suffix == ".txt":
        evaluate_text(
            skill,
            data,
            chunk=chunk,
            limit=limit,
            json=json,
            choice=choice,
        )
        return
    rows = spread(read_rows(data), limit)
    opened, own = open_skill(
        skill,
        choice,
        templates=templates,
        remote=vllm_url is not None,
    )
    if keep is not None:
        opened = opened.keeping(keep)
    behind = gated(opened, skill, recurse_below)
    decoding = evaluation.EVALUATION_DECODING.model_copy(update={"max_new_tokens": max_new_tokens})
    with (
        through(behind, vllm_url, vllm_api_key_file) as answering,
        quiet_progress(stderr(), "evaluating", len(rows)) as advance,
    ):
        result = evaluation.evaluate(
            answering,
            rows,
            own,
            decoding=decoding,
            normalizer="squad" if normalizer == "squad" else "general",
            on_rows=advance,
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
            **provenance(opened, skill, data),
            **result.as_dict(),
            "normalizer": normalizer,
            **recursed,
        },
    )
    stdout().print(results_table(f"{skill} on {data.name}", result))


def _unused(context: typer.Context, skill: str, *, reads: bool, text: bool) -> None:
    """Say which options this kind of data or skill has no use for."""
    if context.params["vllm_url"] is None:
        note_given(context, ["vllm_api_key_file"], "it goes with --vllm-url")
    if reads:
        others = (*_OF_ROWS, "chunk")
        note_given(context, others, "readers have their own way of reading")
        if context.params["index"] is None:
            note_given(context, ["retriever"], "without --index nothing is searched")
        return
    note_given(context, _OF_READERS, f"'{skill}' is no reader, without --index")
    if text:
        note_given(context, (*_OF_ROWS, "dump"), "running text has no answers")
    else:
        note_given(context, ["chunk"], "it is for running text (.txt)")


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
