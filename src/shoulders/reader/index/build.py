"""Building, growing and pruning an index: each is a plan, carried out stage by stage.

A process may be killed at any moment. What was whole before stays whole, and the same call with
`resume` ends with the index that an undisturbed one makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from shoulders import __version__
from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.reader.collections.source import Source, open_source
from shoulders.reader.index.content import Content
from shoulders.reader.index.dense import DenseStage
from shoulders.reader.index.fill import fill, prune
from shoulders.reader.index.ids import ENDS, IDS
from shoulders.reader.index.manifest import (
    FILE,
    UNFINISHED,
    Manifest,
    SourceFacts,
    facts_of,
    read_manifest,
    remove,
    write_manifest,
)
from shoulders.reader.index.needs import Needs, check_disk, needs
from shoulders.reader.index.numbers import read_numbers, write_numbers
from shoulders.reader.index.plan import Checkpoint, DenseChoice, Plan, Sizes, locked, read_plan
from shoulders.reader.index.store import ANALYZER, PassageStore
from shoulders.reader.watch import Watch


class Choices(NamedTuple):
    """What an index is to be; a change of an existing one keeps what that one is.

    Attributes:
        dense: encoders for a dense half, None for a sparse index.
        approximate: also a compressed approximate index of the vectors, for scale.
        words: size of the passages that documents are cut into; None for 100.
        sizes: of the steps.
    """

    dense: DenseChoice | None = None
    approximate: bool = False
    words: int | None = None
    sizes: Sizes = Sizes()


DEFAULT = Choices()


def build(
    source: Path, out: Path, watch: Watch, choices: Choices = DEFAULT, *, resume: bool = False
) -> Manifest:
    """Build an index of `source` in the folder `out`, which must be new or empty.

    With `resume`, an unfinished build of the same source goes on; a finished one is returned.
    """
    with locked(out):
        plan = _unfinished(out, resume, source)
        if plan is None:
            if (out / FILE).is_file():
                if resume:
                    watch.note(f"{out}: the index is finished; nothing to resume")
                    return read_manifest(out)
                raise ArtefactError(f"{out}: an index is there; grow it with --add, or remove it")
            if any(path.name != ".lock" for path in out.iterdir()):
                raise ArtefactError(f"{out}: the folder is not empty, and holds no index")
            plan = Plan(
                operation="build",
                generation=1,
                dense=choices.dense,
                approximate=choices.approximate,
                words=choices.words,
                sizes=choices.sizes,
                checkpoints=[Checkpoint(rows=0, content=Content().hex())],
                source=str(source.resolve()),
                given=str(source),
            )
        return _carry_out(out, plan, None, watch)


def add(
    source: Path, out: Path, watch: Watch, choices: Choices = DEFAULT, *, resume: bool = False
) -> Manifest:
    """Add the passages of `source` to the index in `out`; of `choices`, words and sizes count."""
    with locked(out):
        base = read_manifest(out)
        plan = _unfinished(out, resume, source)
        if plan is None:
            if resume and base.sources[-1].path == str(source):
                watch.note(f"{out}: {source} has been added; nothing to resume")
                return base
            plan = Plan(
                operation="add",
                generation=base.generation + 1,
                first=base.rows,
                dense=_choice(base),
                approximate=base.approximate is not None,
                words=choices.words,
                sizes=choices.sizes,
                checkpoints=[Checkpoint(rows=base.rows, content=base.content)],
                source=str(source.resolve()),
                given=str(source),
            )
        return _carry_out(out, plan, base, watch)


def delete(ids: list[str], out: Path, watch: Watch, *, resume: bool = False) -> Manifest:
    """Delete passages by id, or all of a document by its source, from the index in `out`."""
    with locked(out):
        base = read_manifest(out)
        plan = _unfinished(out, resume, None)
        if plan is None:
            with PassageStore(out / base.store) as store:
                deleted = list(dict.fromkeys(p for name in ids for p in _meant(store, name)))
            if len(deleted) == base.passages:
                raise DataError(f"{out}: these are all passages; remove the folder instead")
            plan = Plan(
                operation="delete",
                generation=base.generation + 1,
                first=base.rows,
                deleted=deleted,
                dense=_choice(base),
                approximate=base.approximate is not None,
                checkpoints=[Checkpoint(rows=base.rows, content=base.content)],
            )
        return _carry_out(out, plan, base, watch)


def make_dense(
    out: Path, watch: Watch, choices: Choices = DEFAULT, *, resume: bool = False
) -> Manifest:
    """Give the index in `out` a dense half, or an approximate index of the one it has."""
    with locked(out):
        base = read_manifest(out)
        plan = _unfinished(out, resume, None)
        if plan is None:
            if base.dense is not None and (base.approximate or not choices.approximate):
                raise ArtefactError(f"{out}: the index is dense already; nothing to do")
            plan = Plan(
                operation="dense",
                generation=base.generation + 1,
                first=base.rows,
                rows=base.rows,
                dense=_choice(base) or choices.dense or DenseChoice(),
                approximate=choices.approximate,
                sizes=choices.sizes,
                checkpoints=[Checkpoint(rows=base.rows, content=base.content)],
            )
        return _carry_out(out, plan, base, watch)


def resume(out: Path, watch: Watch) -> Manifest:
    """Finish whatever is unfinished in `out`."""
    with locked(out):
        plan = _unfinished(out, True, None)
        if plan is None:
            manifest = read_manifest(out)
            watch.note(f"{out}: the index is finished; nothing to resume")
            return manifest
        base = read_manifest(out) if plan.generation > 1 else None
        return _carry_out(out, plan, base, watch)


def estimated(source: Path, choices: Choices = DEFAULT, *, dimensions: int = 384) -> Needs:
    """Return what indexing `source` will need; `dimensions` are those of a dense half's vectors."""
    return needs(
        open_source(source, words=choices.words).estimate(),
        choices.sizes,
        dimensions=dimensions if choices.dense else 0,
        item_bytes=4 if choices.dense and choices.dense.dtype == "float32" else 2,
        approximate=choices.approximate,
    )


def _carry_out(out: Path, plan: Plan, base: Manifest | None, watch: Watch) -> Manifest:
    """Do all stages of a plan that are not done yet, and publish the result."""
    source = open_source(Path(plan.source), words=plan.words) if plan.source else None
    try:
        # What may fail at once comes first: the encoder is found, the disk is large enough.
        stage = DenseStage(plan.dense, base) if plan.dense else None
        if source is not None and plan.rows is None:
            check_disk(out, _needs(source, plan, stage))
        plan.save(out)
        if source is not None and plan.rows is None:
            fill(out, plan, base, source, watch)
    except ShouldersError:
        if not _worth_resuming(out, plan):
            _discard(out, plan)
        raise
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
    approximate = None
    if stage is not None:
        stage.encode(out, plan, base, store, rows, watch)
        if plan.approximate:
            approximate = stage.approximate(out, plan, base, deleted, rows, watch)
    with PassageStore(out / store) as there:
        count = there.count
    sources = list(base.sources) if base is not None else []
    if source is not None and plan.given is not None:
        added = rows - plan.first
        sources.append(SourceFacts(path=plan.given, kind=source.kind, passages=added))
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
        dense=stage.facts if stage else None,
        approximate=approximate,
        files=facts_of(
            out,
            [store, *filter(None, [removed, approximate])],
            growing=[IDS, ENDS, *([stage.file] if stage else [])],
        ),
    )
    write_manifest(out, manifest)
    _clean(out, manifest)
    return manifest


def _unfinished(out: Path, resume: bool, source: Path | None) -> Plan | None:
    """Return the plan to go on with; refuse to begin another where one is unfinished."""
    plan = read_plan(out)
    if plan is None:
        return None
    if (out / FILE).is_file() and (manifest := read_manifest(out)).generation >= plan.generation:
        _clean(out, manifest)  # it was published; the process died while it cleaned up
        return None
    if not resume:
        raise ArtefactError(
            f"{out}: unfinished ({plan.operation}{f' of {plan.given}' if plan.given else ''}); "
            f"go on with: shoulders index --resume --out {out}"
        )
    if source is not None and plan.source != str(source.resolve()):
        raise ArtefactError(f"{out}: what is unfinished is {plan.given}, not {source}")
    return plan


def _choice(base: Manifest) -> DenseChoice | None:
    if base.dense is None:
        return None
    return DenseChoice(
        question=base.dense.question.name,
        passage=base.dense.passage.name,
        pooling=base.dense.passage.pooling,
        dtype=base.dense.dtype,
    )


def _meant(store: PassageStore, name: str) -> list[str]:
    """Return the ids that a user means: those of a document, else the one passage."""
    return store.of_source(name) or [p.id for p in store.passages([name])]


def _needs(source: Source, plan: Plan, stage: DenseStage | None) -> Needs:
    return needs(
        source.estimate(),
        plan.sizes,
        dimensions=stage.facts.dimensions if stage else 0,
        item_bytes=4 if stage and stage.facts.dtype == "float32" else 2,
        approximate=plan.approximate,
    )


def _worth_resuming(out: Path, plan: Plan) -> bool:
    """Say whether something of the change is committed."""
    if plan.rows is not None:
        return True
    if not (out / plan.store).is_dir():
        return False
    with PassageStore(out / plan.store) as store:
        return store.rows > plan.first


def _discard(out: Path, plan: Plan) -> None:
    """Leave the folder as it was before a change that failed at once."""
    remove(out / plan.store)
    remove(out / UNFINISHED)
    if plan.generation == 1:
        remove(out / IDS)
        remove(out / ENDS)


def _clean(out: Path, manifest: Manifest) -> None:
    """Remove what older generations and killed processes left."""
    remove(out / UNFINISHED)
    kept = {name.split("/")[0] for name in manifest.files}
    for path in out.iterdir():
        known = path.name.startswith(("passages-", "deleted-", "approximate-", ".passages-"))
        if known and path.name not in kept:
            remove(path)
