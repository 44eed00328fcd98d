"""`shoulders load SOURCE --into URI`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shoulders.cli.bars import Bars
from shoulders.cli.common import quiet_libraries, stderr, stdout


def load(
    source: Annotated[
        Path, typer.Argument(help="An index folder, a .tsv, a .jsonl or a folder of documents.")
    ],
    into: Annotated[str, typer.Option(help="A LanceDB folder or URI: s3://, gs://, az://, db://.")],
    encoder: Annotated[
        str | None,
        typer.Option(help="Make vectors: embedded, Hub id or folder. An index brings its own."),
    ] = None,
    question_encoder: Annotated[
        str | None, typer.Option(help="Encoder of questions. Default: that of passages.")
    ] = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Also a compressed index of the vectors.")
    ] = False,
    words: Annotated[
        int | None, typer.Option(min=10, max=10_000, help="Words of a passage, of documents: 100.")
    ] = None,
) -> None:
    """Load passages into LanceDB, for collections beyond our own index (docs/scale.md)."""
    from shoulders.reader.engines.loading import load as load_passages
    from shoulders.reader.index.plan import DenseChoice

    dense = None
    if encoder is not None:
        quiet_libraries()
        dense = DenseChoice(question=question_encoder or encoder, passage=encoder)
    watch = Bars(stderr())
    count = load_passages(source, into, watch, dense=dense, approximate=approximate, words=words)
    stdout().print(f"{count:,} passages in {into}", markup=False, highlight=False)
