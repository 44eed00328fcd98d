"""`shoulders generate --skill SKILL_DIR|base (--text S | --input FILE --output FILE)`."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from shoulders.cli import options
from shoulders.cli.answers import TOGETHER, Kept, read_inputs, rendered, write_answers
from shoulders.cli.common import (
    BASE,
    check_argument,
    check_outputs,
    emit_json,
    files_of,
    gated,
    note_given,
    open_skill,
    stderr,
)
from shoulders.cli.remote import through
from shoulders.data.rows import Row
from shoulders.errors import ShouldersError, placed
from shoulders.files import sha256_of_file
from shoulders.skills.hub import local


def generate(
    context: typer.Context,
    skill: Annotated[
        str, typer.Option(help="A skill's or ensemble's folder, hf://USER/SKILL, or 'base'.")
    ] = BASE,
    text: Annotated[str | None, typer.Option(help="One input; the answer is streamed.")] = None,
    input: Annotated[
        Path | None, typer.Option(help='JSONL with "input" and, to use a template, "task".')
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL: each row with its outputs.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the answers that a stopped run has kept.")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="Render --text under this task's first template.")
    ] = None,
    n: Annotated[int, typer.Option(min=1, help="Answers per input.")] = 1,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string. Repeatable.")] = None,
    templates: options.TemplateFile = None,
    keep: options.Keep = None,
    recurse_below: options.RecurseBelow = None,
    json: Annotated[Path | None, typer.Option(help="Write the answers to --text as JSON.")] = None,
    lm: options.LMName = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
    vllm_url: options.VllmURL = None,
    vllm_api_key_file: options.VllmKeyFile = None,
) -> None:
    """Answer one text, or every row of a file, with a skill."""
    from pydantic import ValidationError

    from shoulders.lm.decode import DecodingConfig
    from shoulders.skills.skill import Skill

    skill = local(skill)
    if (text is None) == (input is None):
        raise ShouldersError("give either --text or --input")
    if (input is None) != (output is None):
        raise ShouldersError("--input and --output go together")
    if text is not None and not text.strip():
        raise ShouldersError("--text is empty")
    if text is not None:
        check_argument(text, "--text")
    if vllm_url is not None and recurse_below is not None:
        raise ShouldersError("--vllm-url: --recurse-below asks here; leave out one of them")
    if input is not None:
        note_given(context, ["json"], "it goes with --text; rows are answered in --output")
        note_given(context, ["task"], "rows name their own task")
    else:
        note_given(context, ["resume"], "it goes with --input")
    if text is not None and task is None:
        note_given(context, ["templates"], "--text without --task is not rendered")
    if vllm_url is None:
        note_given(context, ["vllm_api_key_file"], "it goes with --vllm-url")
    check_outputs(json, output, read=[input, templates, *files_of(skill)])
    try:
        decoding = DecodingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            n=n,
            stop=tuple(stop or ()),
            seed=seed,
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise ShouldersError(f"--{first['loc'][0]}: {first['msg']}".replace("_", "-")) from None
    if n > 1 and temperature == 0:
        raise ShouldersError(f"--n {n}: without --temperature all answers are the same one")
    rows, places = read_inputs(input) if input else ([], [])
    opened, own = open_skill(
        skill,
        options.LMChoice(lm, dtype, quantize, device_map),
        templates=templates,
        remote=vllm_url is not None,
    )
    if keep is not None:
        opened = opened.keeping(keep)
    if text is not None:
        read = own.render(Row(task, text, ())) if task else text
        with through(gated(opened, skill, recurse_below), vllm_url, vllm_api_key_file) as answering:
            _answer_one(answering, opened, read, decoding, json)
        return
    assert output is not None  # goes with --input
    texts = [rendered(row, own) for row in rows]
    asked = {
        "skill": "base" if skill == BASE else _hash_of(Path(skill)),
        "lm": opened.lm.fingerprint,
        "dtype": dtype,
        "quantize": quantize,
        "vllm-url": vllm_url is not None,
        "keep": keep,
        "recurse-below": recurse_below,
        **decoding.model_dump(mode="json"),
    }
    kept = Kept(output, asked, resume=resume)
    with placed(texts, places):
        if not (isinstance(opened, Skill) and opened.proposals):  # hours later it would be late
            opened.asking_ids(texts, decoding)
        with (
            through(gated(opened, skill, recurse_below), vllm_url, vllm_api_key_file) as answering,
            kept.telling(functools.partial(stderr().print, markup=False)),
        ):
            _answer_all(answering, texts, decoding, kept)
            write_answers(output, rows, [kept.found[text] for text in texts])


def _hash_of(folder: Path) -> str:
    """Return the hash of what a skill answers with, not of its card, checkpoints or notes."""
    from shoulders.skills.artefact import ENSEMBLE, FILE, TENSORS
    from shoulders.training.checkpoint import FOLDER

    files = sorted(f for name in (ENSEMBLE, FILE, TENSORS) for f in folder.rglob(name))
    return "+".join(sha256_of_file(f) for f in files if FOLDER not in f.parts)


def _answer_all(answering: Any, texts: list[str], decoding: Any, kept: Kept) -> None:
    """Answer what is not answered yet."""
    from shoulders.progress import quiet_progress

    parts = list(kept.missing(texts, max(1, TOGETHER // decoding.n)))
    with quiet_progress(stderr(), "generating", sum(map(len, parts))) as advance:
        for part in parts:
            answers = answering.generate(part, decoding, on_rows=advance)
            kept.add(part, [[_output(c) for c in several] for several in answers])


def _output(completion: Any) -> dict[str, Any]:
    return {name: getattr(completion, name) for name in ("text", "logprob", "finish")}


def _answer_one(answering: Any, skill: Any, text: str, decoding: Any, json: Path | None) -> None:
    """Stream a single answer to standard output; print several one after the other."""
    if answering is not skill:  # a gate knows at the end only; an engine is asked for the whole
        completions = answering.generate([text], decoding)[0]
        sys.stdout.write("".join(f"{c.text}\n" for c in completions))
    elif decoding.n == 1:
        completions = []
        for delta in skill.stream(text, decoding):
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            if delta.completion is not None:
                completions = [delta.completion]
        sys.stdout.write("\n")
    else:
        completions = skill.generate([text], decoding)[0]
        for number, completion in enumerate(completions, 1):
            sys.stdout.write(f"[{number}] {completion.text}\n")
    emit_json(json, {"input": text, "outputs": [asdict(c) for c in completions]})
