"""The first stage of a change: passages from a source into the store, batch by batch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from shoulders.errors import DataError
from shoulders.files import writing_to
from shoulders.reader.collections.source import Source, Sourced
from shoulders.reader.index.content import Content
from shoulders.reader.index.ids import IdWriter
from shoulders.reader.index.manifest import Manifest, remove
from shoulders.reader.index.plan import Plan
from shoulders.reader.index.store import MAX_ID, PassageStore, StoreWriter
from shoulders.reader.watch import Watch

# tantivy replaces these in place of the rest, which it only ever writes anew.
_REPLACED = ("meta.json", ".managed.json")


def fill(folder: Path, plan: Plan, base: Manifest | None, source: Source, watch: Watch) -> None:
    """Add the passages of `source` to the store of `plan`, going on after what is committed.

    The checkpoint is written before each commit: whichever of the two a kill falls between, one
    of the last two checkpoints is what the store holds.

    Raises `DataError` for bad passages, ids that are there already, and a source that is not what
    it was when the killed process read it.
    """
    store = folder / plan.store
    if base is not None and not store.is_dir():
        clone(folder / base.store, store)
    writer = StoreWriter(store, plan.sizes.heap)
    with PassageStore(store) as there:
        committed = max(there.rows, plan.first)
    plan.checkpoints = [c for c in plan.checkpoints if c.rows <= committed]
    ids = IdWriter(folder)
    ids.cut(committed)
    content = Content(base.content if base is not None else "0")
    batch = _Batch(folder, plan, writer, ids)
    number = plan.first
    with watch.stage("passages", source.estimate().passages) as advance:
        for sourced in source.read(watch.note):
            content.add(sourced.passage)
            number += 1
            if number > committed:
                batch.add(sourced)
                if batch.full:
                    batch.commit(number, content)
                    advance(plan.sizes.batch)
            elif number == committed:
                _same(plan, committed, content, source)
                advance(committed - plan.first)
    if number < committed:
        raise _changed(source)
    if number == plan.first:
        raise DataError(f"{source.path}: holds no passages")
    if batch.sourced:
        batch.commit(number, content)
    writer.close()
    plan.rows = number
    plan.save(folder)


def prune(folder: Path, plan: Plan, base: Manifest, content: Content) -> list[int]:
    """Delete passages in a copy of the store; return their numbers.

    Starts anew after a kill: it takes no time.
    """
    store = folder / plan.store
    remove(store)
    clone(folder / base.store, store)
    writer = StoreWriter(store, plan.sizes.heap)
    with PassageStore(store) as there:
        numbers = [there.number(passage_id) for passage_id in plan.deleted]
        for passage_id, passage in zip(plan.deleted, there.passages(plan.deleted), strict=True):
            content.remove(passage)
            writer.delete(passage_id)
    writer.commit()
    writer.close()
    return numbers


def clone(old: Path, new: Path) -> None:
    """Copy a passage store, by hard links where the file system has them."""
    partial = new.with_name(f".{new.name}.partial")
    remove(partial)

    def link(source: str, target: str) -> str:
        if Path(source).name in _REPLACED:
            return shutil.copy2(source, target)
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
        return target

    with writing_to(new):
        shutil.copytree(
            old, partial, copy_function=link, ignore=shutil.ignore_patterns(".tantivy-*.lock")
        )
        partial.rename(new)


class _Batch:
    """Passages that are committed together, after a look for ids that are there already."""

    def __init__(self, folder: Path, plan: Plan, writer: StoreWriter, ids: IdWriter) -> None:
        self.sourced: list[Sourced] = []
        self._places: dict[str, str] = {}
        self._folder, self._plan, self._writer, self._ids = folder, plan, writer, ids

    @property
    def full(self) -> bool:
        return len(self.sourced) >= self._plan.sizes.batch

    def add(self, sourced: Sourced) -> None:
        passage_id, place = sourced.passage.id, sourced.place
        if len(passage_id.encode()) > MAX_ID:
            raise DataError(f"{place}: an id of over {MAX_ID} bytes")
        if passage_id in self._places:
            raise DataError(
                f"{place}: duplicate id '{passage_id}', first at {self._places[passage_id]}"
            )
        self._places[passage_id] = place
        self.sourced.append(sourced)

    def commit(self, rows: int, content: Content) -> None:
        """Commit the batch; `rows` and `content` are those with it."""
        with PassageStore(self._folder / self._plan.store) as store:
            twice = store.known(list(self._places))
            if twice is not None:
                if store.number(twice) >= self._plan.first:
                    raise DataError(
                        f"{self._places[twice]}: duplicate id '{twice}', seen earlier in this "
                        "source"
                    )
                advice = "delete it first"
                if self._plan.kind == "documents":  # of another folder, perhaps
                    advice += " if this is another version of it; else index their common folder"
                raise DataError(f"{self._places[twice]}: id '{twice}' is in the index; {advice}")
        first = rows - len(self.sourced)
        for number, sourced in enumerate(self.sourced, start=first):
            self._writer.add(number, sourced.passage)
        self._ids.append(self._places)
        self._plan.checkpoint(rows, content.hex())
        self._plan.save(self._folder)
        self._writer.commit()
        self.sourced.clear()
        self._places.clear()


def _same(plan: Plan, committed: int, content: Content, source: Source) -> None:
    if plan.content_at(committed) != content.hex():
        raise _changed(source)


def _changed(source: Source) -> DataError:
    return DataError(
        f"{source.path}: changed since the unfinished index was begun; remove the index's folder "
        "(or, of an index that was whole, give the change up: --abandon) and begin again"
    )
