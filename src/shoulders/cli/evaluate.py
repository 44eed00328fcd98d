"""`shoulders eval SKILL_DIR|base --data FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli import options, readers
from shoulders.cli.common import check_outputs, files_of, note_given
from shoulders.cli.perplexity import evaluate_text
from shoulders.cli.rows import evaluate_rows
from shoulders.errors import ShouldersError
from shoulders.skills.hub import local

# What each kind of data alone takes, see `_unused`.
_OF_READERS = ("retriever", "k", "window", "no_rerank", "abstain_below", "contexts", "plot")
_OF_ROWS = ("templates", "normalizer", "max_new_tokens", "keep", "recurse_below")


def evaluate(
    context: typer.Context,
    skill: Annotated[
        str, typer.Argument(help="A skill's or ensemble's folder, hf://USER/SKILL, or 'base'.")
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
    skill = local(skill)
    if normalizer not in ("general", "squad"):
        raise ShouldersError(f"--normalizer {normalizer}: use general or squad")
    reads = index is not None or readers.is_reader(skill)
    if vllm_url is not None and (recurse_below is not None or reads or data.suffix == ".txt"):
        raise ShouldersError("--vllm-url: readers, running text and --recurse-below are asked here")
    _unused(context, skill, reads=reads, text=data.suffix == ".txt")
    read = [data, templates, *files_of(skill), *(files_of(index) if index is not None else ())]
    check_outputs(json, dump, contexts, plot, read=read)
    choice = options.LMChoice(lm, dtype, quantize, device_map)
    if reads:
        questions = readers.questions_to_score(data, limit, searches=index is not None)
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
            questions,
            json=json,
            dump=dump,
            contexts=contexts,
            plot=plot,
        )
        return
    if data.suffix == ".txt":
        evaluate_text(skill, data, chunk=chunk, limit=limit, json=json, choice=choice)
        return
    evaluate_rows(
        skill,
        data,
        choice,
        templates=templates,
        limit=limit,
        json=json,
        dump=dump,
        normalizer="squad" if normalizer == "squad" else "general",
        max_new_tokens=max_new_tokens,
        keep=keep,
        recurse_below=recurse_below,
        vllm_url=vllm_url,
        vllm_api_key_file=vllm_api_key_file,
    )


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
