"""Building, growing and pruning an index: each is a plan, carried out stage by stage.

A process may be killed at any moment. What was whole before stays whole, and the same call with
`resume`, or `finish`, ends with the index that an undisturbed one makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from shoulders.errors import ArtefactError, DataError
from shoulders.files import only_writer
from shoulders.reader.collections.source import open_source
from shoulders.reader.index.carry import carry_out, clean
from shoulders.reader.index.content import Content
from shoulders.reader.index.manifest import FILE, Manifest, read_manifest
from shoulders.reader.index.plan import Checkpoint, DenseChoice, Plan, Sizes, read_plan
from shoulders.reader.index.store import PassageStore
from shoulders.reader.retrievers.approximate import LEAST, too_few
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

    With `resume`, an unfinished build of the same source goes on, with the choices it was begun
    with; a finished one is returned.

    Raises:
        DataError: the source is missing, empty, or holds something that is no passage.
        ArtefactError: something else is in `out`.
        ShouldersError: the disk cannot hold the index.
    """
    kind = open_source(source, words=choices.words).kind
    with only_writer(out):
        plan = _unfinished(out, resume, source)
        if plan is None:
            if (out / FILE).is_file():
                if resume:
                    watch.note(f"{out}: the index is finished; nothing to resume")
                    return read_manifest(out)
                raise ArtefactError(f"{out}: an index is there; grow it with --add, or remove it")
            if any(not path.name.startswith(".") for path in out.iterdir()):
                raise ArtefactError(f"{out}: the folder is not empty, and holds no index")
            plan = Plan(
                operation="build",
                generation=1,
                source=str(source.resolve()),
                given=str(source),
                kind=kind,
                dense=choices.dense or (DenseChoice() if choices.approximate else None),
                approximate=choices.approximate,
                words=choices.words,
                sizes=choices.sizes,
                checkpoints=[Checkpoint(rows=0, content=Content().hex())],
            )
        return carry_out(out, plan, watch)


def add(
    source: Path, out: Path, watch: Watch, choices: Choices = DEFAULT, *, resume: bool = False
) -> Manifest:
    """Add the passages of `source` to the index in `out`; of `choices`, words and sizes count.

    Until it is done, the index opens as it was before.
    """
    kind = open_source(source, words=choices.words).kind
    read_manifest(out)
    with only_writer(out):
        base = read_manifest(out)
        plan = _unfinished(out, resume, source)
        if plan is None:
            if resume and base.sources[-1].path == str(source):
                watch.note(f"{out}: {source} has been added; nothing to resume")
                return base
            clean(out, base)
            plan = _change(base, "add", choices.sizes)
            plan.source, plan.given, plan.kind = str(source.resolve()), str(source), kind
            plan.words = choices.words
            plan.dense = _choice(base)
            plan.approximate = base.approximate is not None
        return carry_out(out, plan, watch)


def delete(ids: list[str], out: Path, watch: Watch) -> Manifest:
    """Delete passages by id, or all of a document by its source, from the index in `out`.

    BM25's statistics (how many passages hold a word) count deleted passages until tantivy merges
    the segments they are in, as Lucene's do.

    Raises `DataError` for an id that is not there, or where no passage would be left.
    """
    read_manifest(out)
    with only_writer(out):
        base = read_manifest(out)
        _unfinished(out, False, None)
        clean(out, base)
        with PassageStore(out / base.store) as store:
            deleted = list(dict.fromkeys(p for name in ids for p in _meant(store, name)))
        if len(deleted) == base.passages:
            raise DataError(f"{out}: these are all passages; remove the folder instead")
        plan = _change(base, "delete", Sizes())
        plan.deleted = deleted
        return carry_out(out, plan, watch)


def make_dense(out: Path, watch: Watch, choices: Choices, *, resume: bool = False) -> Manifest:
    """Give the index in `out` a dense half, or an approximate index of the one it has."""
    read_manifest(out)
    with only_writer(out):
        base = read_manifest(out)
        plan = _unfinished(out, resume, None)
        if plan is None:
            clean(out, base)
            if base.dense is not None and (base.approximate or not choices.approximate):
                if resume:
                    watch.note(f"{out}: the index is dense; nothing to resume")
                    return base
                raise ArtefactError(f"{out}: the index is dense already; nothing to do")
            if choices.approximate and base.passages < LEAST:
                raise DataError(f"{out}: {too_few(base.passages)}")
            plan = _change(base, "dense", choices.sizes)
            plan.rows = base.rows
            plan.dense = _choice(base) or choices.dense or DenseChoice()
            plan.approximate = choices.approximate
        elif plan.operation != "dense":
            raise _begun(out, plan)
        return carry_out(out, plan, watch)


def finish(out: Path, watch: Watch) -> Manifest:
    """Finish whatever is unfinished in `out`."""
    if read_plan(out) is None:
        read_manifest(out)
    with only_writer(out):
        plan = _unfinished(out, True, None)
        if plan is None:
            watch.note(f"{out}: the index is finished; nothing to resume")
            return read_manifest(out)
        return carry_out(out, plan, watch)


def abandon(out: Path, watch: Watch) -> Manifest:
    """Give up what is unfinished in `out`: the index stays as it was before that."""
    if read_plan(out) is None:
        read_manifest(out)
    with only_writer(out):
        plan = read_plan(out)
        if not (out / FILE).is_file():
            raise ArtefactError(f"{out}: was never finished: remove the folder, or --resume")
        base = read_manifest(out)
        if plan is None:
            watch.note(f"{out}: nothing is unfinished")
        clean(out, base)
        return base


def _change(base: Manifest, operation: Literal["add", "delete", "dense"], sizes: Sizes) -> Plan:
    return Plan(
        operation=operation,
        generation=base.generation + 1,
        first=base.rows,
        sizes=sizes,
        checkpoints=[Checkpoint(rows=base.rows, content=base.content)],
    )


def _unfinished(out: Path, resume: bool, source: Path | None) -> Plan | None:
    """Return the plan to go on with; refuse to begin another where one is unfinished."""
    plan = read_plan(out)
    if plan is None:
        return None
    if (out / FILE).is_file() and (manifest := read_manifest(out)).generation >= plan.generation:
        clean(out, manifest)  # it was published; the process died while it cleaned up
        return None
    if not resume:
        raise _begun(out, plan)
    if source is not None and plan.source != str(source.resolve()):
        raise ArtefactError(f"{out}: what is unfinished is {plan.given}, not {source}")
    return plan


def _begun(out: Path, plan: Plan) -> ArtefactError:
    what = f"{plan.operation} of {plan.given}" if plan.given else plan.operation
    return ArtefactError(
        f"{out}: unfinished ({what}); go on with: shoulders index --resume --out {out} (or give "
        "it up: --abandon)"
    )


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
