"""Carrying out a plan: its stages in order, each going on where a killed process left it."""

from __future__ import annotations

from pathlib import Path

from shoulders import __version__
from shoulders.errors import ArtefactError, ShouldersError
from shoulders.files import remove_partial
from shoulders.reader.collections.source import Source, open_source
from shoulders.reader.index.content import Content
from shoulders.reader.index.dense import DenseStage
from shoulders.reader.index.fill import fill, prune
from shoulders.reader.index.ids import ENDS, IDS, IdWriter
from shoulders.reader.index.manifest import (
    UNFINISHED,
    Manifest,
    SourceFacts,
    facts_of,
    read_manifest,
    remove,
    write_manifest,
)
from shoulders.reader.index.needs import check_disk, needs
from shoulders.reader.index.numbers import read_numbers, write_numbers
from shoulders.reader.index.plan import Plan
from shoulders.reader.index.store import ANALYZER, PassageStore
from shoulders.reader.index.vectors import VectorFile, vectors_name
from shoulders.reader.watch import Watch


def carry_out(out: Path, plan: Plan, watch: Watch) -> Manifest:
    """Do all stages of a plan that are not done yet, publish the result and return it."""
    base = read_manifest(out) if plan.generation > 1 else None
    stage = _passages(out, plan, base, watch)
    content = Content(plan.checkpoints[-1].content)
    deleted = read_numbers(out, base.deleted if base is not None else None)
    store = plan.store
    if plan.operation == "delete":
        assert base is not None
        deleted = sorted({*deleted, *prune(out, plan, base, content)})
    elif plan.operation == "dense":
        assert base is not None
        store = base.store
    rows = plan.rows if plan.rows is not None else plan.first
    removed = write_numbers(out, plan.generation, deleted)
    dense = base.dense if base is not None else None
    approximate = base.approximate if base is not None else None
    if stage is not None:
        dense = stage.facts
        stage.encode(out, plan, base, store, rows, watch)
        if plan.approximate:
            approximate = stage.approximate(out, plan, base, deleted, rows, watch)
    with PassageStore(out / store) as there:
        count = there.count
    sources = list(base.sources) if base is not None else []
    if plan.given is not None:
        added = rows - plan.first
        sources.append(SourceFacts(path=plan.given, kind=plan.kind or "", passages=added))
    manifest = Manifest(
        version=__version__,
        generation=plan.generation,
        passages=count,
        rows=rows,
        content=content.hex(),
        analyzer=ANALYZER,
        sources=sources,
        store=store,
        deleted=removed,
        dense=dense,
        approximate=approximate,
        files=facts_of(
            out,
            [store, *filter(None, [removed, approximate])],
            growing=[IDS, ENDS, *([vectors_name(dense.dtype)] if dense else [])],
        ),
    )
    write_manifest(out, manifest)
    clean(out, manifest)
    return manifest


def _passages(out: Path, plan: Plan, base: Manifest | None, watch: Watch) -> DenseStage | None:
    """Bring in the passages; return the dense stage, whose encoder is loaded first.

    A change that fails before anything of it is committed leaves the folder as it was.
    """
    try:
        stage = DenseStage(plan.dense, base) if plan.dense else None
        source = None
        if plan.source is not None and plan.rows is None:
            source = open_source(Path(plan.source), words=plan.words)
            _check_disk(out, plan, source, stage, watch)
        plan.save(out)
        if source is not None:
            fill(out, plan, base, source, watch)
    except ShouldersError:
        if not _worth_resuming(out, plan):
            _discard(out, plan)
        raise
    return stage


def _check_disk(
    out: Path, plan: Plan, source: Source, stage: DenseStage | None, watch: Watch
) -> None:
    wanted = needs(
        source.estimate(),
        plan.sizes,
        dimensions=stage.facts.dimensions if stage else 0,
        item_bytes=4 if stage and stage.facts.dtype == "float32" else 2,
        approximate=plan.approximate,
    )
    watch.note(f"{plan.given}: {wanted.shown()}")
    # What an unfinished first build has written is a part of what it needs.
    written = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    check_disk(out, wanted, written if plan.generation == 1 else 0)


def _worth_resuming(out: Path, plan: Plan) -> bool:
    """Say whether something of the change is committed."""
    if plan.rows is not None:
        return True
    try:
        with PassageStore(out / plan.store) as store:
            return store.rows > plan.first
    except ArtefactError:
        return False  # not even begun


def _discard(out: Path, plan: Plan) -> None:
    """Leave the folder as it was before a change that failed at once."""
    remove(out / plan.store)
    remove(out / UNFINISHED)
    if plan.generation == 1:
        remove(out / IDS)
        remove(out / ENDS)


def clean(out: Path, manifest: Manifest) -> None:
    """Remove what older generations, killed processes and changes that were given up left."""
    remove(out / UNFINISHED)
    IdWriter(out).cut(manifest.rows)
    dense = manifest.dense
    if dense is not None:
        own = out / vectors_name(dense.dtype)
        VectorFile(own, dense.dimensions, dense.dtype).cut(manifest.rows)
    for file in out.glob(vectors_name("*")):
        if dense is None or file.name != vectors_name(dense.dtype):
            remove(file)
    kept = {name.split("/")[0] for name in manifest.files}
    for path in out.iterdir():
        known = path.name.startswith(("passages-", "deleted-", "approximate-", ".passages-"))
        if known and path.name not in kept:
            remove(path)
    remove_partial(out)  # the folder is locked: nobody else is writing
