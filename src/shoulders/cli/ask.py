"""`shoulders ask "question" --index DIR`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.panel import Panel
from rich.text import Text

from shoulders.cli import options
from shoulders.cli.common import check_argument, check_outputs, emit_json, files_of, stderr, stdout
from shoulders.errors import ShouldersError
from shoulders.skills.hub import local

if TYPE_CHECKING:
    from shoulders.skills.reader import Answer


def ask(
    question: Annotated[str, typer.Argument(help="What to ask of the documents.")],
    index: Annotated[
        str, typer.Option(help="An index folder (`shoulders index`), or a LanceDB folder or URI.")
    ],
    skill: Annotated[
        str, typer.Option(help="A reader folder, or 'base' for the bare LM.")
    ] = "base",
    show_context: Annotated[
        bool, typer.Option("--show-context", help="Show the passages that were read.")
    ] = False,
    retriever: Annotated[
        str | None, typer.Option(help="sparse, dense, approximate or hybrid.")
    ] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Passages to retrieve.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of passages. Default: the reader's.")
    ] = None,
    abstain_below: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Withhold answers less likely to be right than this."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the answer and its passages.")] = None,
    lm: options.LMName = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    device_map: options.DeviceMap = None,
) -> None:
    """Answer a question from indexed documents, and say on which passages the answer rests."""
    from shoulders.cli.readers import open_reader
    from shoulders.reader.questions import Question

    skill = local(skill)
    if not question.strip():
        raise ShouldersError("the question is empty")
    check_argument(question, "the question")
    check_outputs(json, read=[*files_of(skill), *files_of(index)])
    reader = open_reader(
        skill,
        index,
        retriever=retriever,
        k=k,
        window=window,
        abstain_below=abstain_below,
        choice=options.LMChoice(lm, dtype, quantize, device_map),
    )
    asked = Question(question.strip(), ())
    ranked = reader.contexts.ranked([asked])
    packed = reader.packed([asked], ranked)[0]
    if show_context:
        for number, passage in enumerate(packed.used, 1):
            where = " · ".join(filter(None, (passage.title, passage.source)))
            # As they are: `[options]` in a passage is no markup.
            title = Text(f"{number}. {where or passage.id}")
            stderr().print(Panel(Text(passage.text), title=title))
    # What may yet be withheld is not shown while it is written.
    hidden = reader.config.abstain_below is not None
    from shoulders.skills.reader import first_line

    completion, said, shown = None, "", 0
    for delta in reader.stream(packed):
        said += delta.text
        if not hidden:  # the answer is the first line
            line = first_line(said)
            sys.stdout.write(line[shown:])
            sys.stdout.flush()
            shown = len(line)
        completion = delta.completion or completion
    assert completion is not None  # generation ends with one
    answer = reader.judged(completion, ranked[0], packed)
    if hidden:
        sys.stdout.write(answer.text)
    sys.stdout.write("\n")
    counts = Counter(p.source or p.title or p.id for p in packed.used)
    sources = ", ".join(f"{name} ({n} passages)" if n > 1 else name for name, n in counts.items())
    none = "no passage was found"
    if ranked[0].passages:
        none = f"of {len(ranked[0].passages)} passages none fits; give a larger --window"
    rest = f"rests on: {sources or f'nothing: {none}'}"
    stdout().print(rest, style="dim", markup=False)
    emit_json(json, as_json(question, answer))


def as_json(question: str, answer: Answer) -> dict[str, Any]:
    """Return an answer for machines, the passages as FiD and DPR name them."""
    found = answer.ranked
    return {
        "question": question,
        "answer": answer.text,
        "proposed": answer.proposed,
        "abstained": answer.abstained,
        "confidence": answer.confidence,
        "logprob": answer.logprob,
        "read": [p.id for p in answer.packed.used],
        "left_out": list(answer.packed.left_out),
        "ctxs": [
            {"id": p.id, "title": p.title, "text": p.text, "source": p.source, "score": score}
            for p, score in zip(found.passages, found.scores, strict=True)
        ],
    }
