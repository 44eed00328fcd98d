"""`shoulders index SOURCE --out DIR`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from shoulders.cli.bars import Bars
from shoulders.cli.common import check_outputs, emit_json, quiet_libraries, stderr, stdout
from shoulders.errors import ShouldersError

if TYPE_CHECKING:
    from shoulders.reader.index.build import Choices
    from shoulders.reader.index.manifest import Manifest
    from shoulders.reader.index.plan import DenseChoice


def index(
    out: Annotated[Path | None, typer.Option(help="Folder of the index.")] = None,
    source: Annotated[
        Path | None,
        typer.Argument(help="DPR's .tsv, a BEIR or passage .jsonl, or a folder of documents."),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Instead of --out: LanceDB, by folder or URI (s3://, gs://, az://, db://)."
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Also vectors of the passages, by a frozen encoder.")
    ] = False,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Also a compressed index of the vectors, for scale."),
    ] = False,
    encoder: Annotated[
        str | None,
        typer.Option(help="Encoder of passages: embedded, Hub id or folder. Implies --dense."),
    ] = None,
    question_encoder: Annotated[
        str | None, typer.Option(help="Encoder of questions. Default: that of passages.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls. Default: as the encoder's folder says.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is unfinished in --out.")
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Add SOURCE to the index that is there.")
    ] = False,
    delete: Annotated[
        list[str] | None,
        typer.Option(help="Delete a passage by its id, or a document by its path. Repeatable."),
    ] = None,
    words: Annotated[
        int | None, typer.Option(min=10, max=10_000, help="Words of a passage, of documents: 100.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Passages between two commits: what a kill loses.")
    ] = None,
    abandon: Annotated[
        bool, typer.Option("--abandon", help="Give up an unfinished change of the index in --out.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the facts as JSON.")] = None,
) -> None:
    """Make passages searchable; grow or prune an index. Killed at any moment, --resume goes on."""
    from shoulders.reader.index.build import Choices
    from shoulders.reader.index.plan import DenseChoice, Sizes

    check_outputs(json, read=[source])
    if json is not None and source is not None and source.resolve() in json.resolve().parents:
        raise ShouldersError(f"{json}: stands among the documents; write to another folder")
    if pooling not in (None, "mean", "cls"):
        raise ShouldersError(f"--pooling {pooling}: use mean or cls")
    if pooling is not None and not (dense or encoder or question_encoder or approximate):
        raise ShouldersError("--pooling is of --dense: there are no vectors without it")
    chosen = None
    # An index that is loaded elsewhere brings its own vectors.
    if dense or encoder or question_encoder or (approximate and into is None):
        quiet_libraries()
        passage = encoder or "embedded"
        chosen = DenseChoice(
            question=question_encoder or passage,
            passage=passage,
            pooling=pooling,  # type: ignore[arg-type]
        )
    if into is not None:
        if out or resume or add or delete or batch or abandon:
            raise ShouldersError("--into stands for --out; it loads a SOURCE whole, from the start")
        _load(source, into, chosen, approximate=approximate, words=words, json=json)
        return
    if out is None:
        raise ShouldersError("where to? give --out DIR (or --into, for LanceDB)")
    sizes = Sizes(batch=batch, window=min(batch, 2048)) if batch else Sizes()
    choices = Choices(chosen, approximate, words, sizes)
    do = _chosen(source, out, choices, resume=resume, add=add, delete=delete or [], abandon=abandon)
    began = time.monotonic()
    watch = Bars(stderr())
    manifest = do(watch)
    facts = {
        "index": str(out),
        **index_facts(manifest),
        "seconds": round(time.monotonic() - began, 2),
        "notes": watch.notes,
    }
    emit_json(json, facts)
    show_index(out, facts)


def _load(
    source: Path | None,
    into: str,
    dense: DenseChoice | None,
    *,
    approximate: bool,
    words: int | None,
    json: Path | None,
) -> None:
    """Load passages into LanceDB, for collections beyond our own index (docs/scale.md)."""
    from shoulders.reader.engines.loading import load

    if source is None:
        raise ShouldersError("which SOURCE? an index, a .tsv, a .jsonl or a folder of documents")
    watch = Bars(stderr())
    count = load(source, into, watch, dense=dense, approximate=approximate, words=words)
    emit_json(json, {"index": into, "passages": count, "notes": watch.notes})
    # Nobody could copy a path that is wrapped.
    stdout().print(f"{count:,} passages in {into}", markup=False, highlight=False, soft_wrap=True)


def index_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what an index holds, for people and machines."""
    dense = manifest.dense
    retrievers = ["sparse"]
    if dense is not None:
        retrievers += ["dense", *(["approximate"] if manifest.approximate else []), "hybrid"]
    return {
        "passages": manifest.passages,
        "deleted": manifest.rows - manifest.passages,
        "retrievers": retrievers,
        "sources": [f"{s.path}: {s.passages:,} passages ({s.kind})" for s in manifest.sources],
        "encoder": None if dense is None else dense.passage.name,
        "question_encoder": None if dense is None else dense.question.name,
        "encoder_fingerprint": None if dense is None else dense.passage.fingerprint,
        "bytes": manifest.bytes,
        "bytes_per_passage": round(manifest.bytes / max(manifest.passages, 1), 1),
        "generation": manifest.generation,
        "content": manifest.content,
        "version": manifest.version,
    }


def show_index(folder: Path, facts: dict[str, Any]) -> None:
    """Print a table of the facts that are there."""
    table = Table(show_header=False, title=escape(str(folder)), title_justify="left")
    for key, value in facts.items():
        if value in (None, [], 0) or key in ("index", "notes", "encoder_fingerprint", "version"):
            continue
        shown = "\n".join(map(str, value)) if isinstance(value, list) else value
        count = isinstance(shown, int) and not isinstance(shown, bool)
        table.add_row(key.replace("_", " "), escape(f"{shown:,}" if count else str(shown)))
    stdout().print(table)


def _chosen(
    source: Path | None,
    out: Path,
    choices: Choices,
    *,
    resume: bool,
    add: bool,
    delete: list[str],
    abandon: bool,
) -> Callable[[Any], Manifest]:
    """Return what the options ask for; contradictions are refused before anything is done."""
    from shoulders.reader.index import build as do

    built = choices.dense is not None or choices.approximate or choices.words is not None
    if abandon:
        if source is not None or add or resume or delete or built:
            raise ShouldersError("--abandon stands alone: it gives up what is unfinished in --out")
        return lambda watch: do.abandon(out, watch)
    if delete:
        if source is not None or add or resume or built:
            raise ShouldersError("--delete stands alone: first delete, then --add SOURCE")
        return lambda watch: do.delete(delete, out, watch)
    if source is None:
        if choices.dense is not None and not add:
            return lambda watch: do.make_dense(out, watch, choices, resume=resume)
        if resume:
            return lambda watch: do.finish(out, watch)
        raise ShouldersError("which SOURCE? a .tsv, a .jsonl or a folder of documents")
    if add:
        if choices.dense is not None:
            raise ShouldersError(
                "--add keeps to the encoders that the index has; leave out --dense, "
                "--approximate and --encoder"
            )
        return lambda watch: do.add(source, out, watch, choices, resume=resume)
    return lambda watch: do.build(source, out, watch, choices, resume=resume)
