"""An index on disk: built, grown, pruned, interrupted anywhere, damaged; and what it then says."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.files import only_writer
from shoulders.reader.index import carry, fill, needs, store, vectors
from shoulders.reader.index.build import Choices, abandon, add, build, delete, finish, make_dense
from shoulders.reader.index.index import Index
from shoulders.reader.index.manifest import FILE, UNFINISHED, read_manifest
from shoulders.reader.index.plan import DenseChoice, Plan, Sizes
from shoulders.reader.passage import Passage
from shoulders.reader.watch import Silent
from tiny_models import save_tiny_encoder

SIZES = Sizes(batch=7, window=5, heap=15_000_000)
SPARSE = Choices(sizes=SIZES)
QUESTIONS = ["alpha", "beta gamma", "who is alpha alpha of delta?", "word3 word9", "nothing"]
WORDS = ("alpha", "beta", "gamma", "delta")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def dense(encoder: Path) -> Choices:
    return Choices(DenseChoice(question=str(encoder), passage=str(encoder)), sizes=SIZES)


def texts(first: int, last: int) -> list[Passage]:
    return [
        Passage(f"p{n}", f"title {n % 3}", f"{WORDS[n % 4]} word{n} {'filler ' * (n % 5)}")
        for n in range(first, last)
    ]


def table(path: Path, passages: Sequence[Passage]) -> Path:
    rows = "".join(f"{p.id}\t{p.text}\t{p.title}\n" for p in passages)
    path.write_text("id\ttext\ttitle\n" + rows, encoding="utf-8")
    return path


class Seen(NamedTuple):
    """What can be seen of an index: its content, and what searches find."""

    content: str
    passages: int
    sparse: Any
    dense: Any
    vectors: bytes


def seen(folder: Path) -> Seen:
    with Index(folder) as index:
        manifest = index.manifest
        stored = b"" if manifest.dense is None else (folder / "vectors.float16").read_bytes()
        return Seen(
            manifest.content,
            len(index),
            index.sparse().search(QUESTIONS, 10),
            index.dense().search(QUESTIONS, 10) if manifest.dense else None,
            stored,
        )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_index_holds_the_passages(tmp_path: Path) -> None:
    expected = texts(0, 40)
    manifest = build(table(tmp_path / "t.tsv", expected), tmp_path / "index", Silent(), SPARSE)
    assert manifest.passages == manifest.rows == 40
    with Index(tmp_path / "index") as index:
        assert index.passages([p.id for p in expected]) == expected
        assert index.passages(["p3", "p1", "p3"]) == [expected[3], expected[1], expected[3]]
        with pytest.raises(DataError, match="no passage with the id 'p99'"):
            index.passages(["p1", "p99"])
    names = {path.name for path in (tmp_path / "index").iterdir()}
    assert names == {FILE, "ids.utf8", "ids.ends", "passages-0001"}


def test_odd_ids_and_texts_come_back(tmp_path: Path) -> None:
    odd = [
        Passage("a b/ü#1", "Ünï", "text with \\ and \"quotes\" 'and' {braces}"),
        Passage("日本", "", "日本語のテキスト"),
        Passage("AND", "OR NOT", "+ - && || ! ( ) { } [ ] ^ ~ * ? : \\ /", "some/source.txt"),
        Passage("x" * 2000, "t", "y" * 100_000),
    ]
    source = tmp_path / "p.jsonl"
    rows = [{"id": p.id, "title": p.title, "text": p.text, "source": p.source} for p in odd]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    build(source, tmp_path / "index", Silent())
    with Index(tmp_path / "index") as index:
        assert index.passages([p.id for p in odd]) == odd
        assert index.sparse().search(["braces"], 3).ids == [["a b/ü#1"]]


class KilledError(BaseException):
    """Stands for a kill: no `except` of the package may catch it."""


def killed_at(place: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Die in the `place`-th step of writing, counted over everything that writes; say how many."""
    count = 0

    def dying(owner: Any, name: str, *, before: bool) -> None:
        real = getattr(owner, name)

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            now = count
            if before and now == place:
                raise KilledError
            result = real(*args, **kwargs)
            if not before and now == place:
                raise KilledError
            return result

        monkeypatch.setattr(owner, name, step)

    for before in (True, False):
        dying(Plan, "save", before=before)
        dying(fill.StoreWriter, "commit", before=before)
        dying(fill.StoreWriter, "close", before=before)
        dying(fill.IdWriter, "append", before=before)
        dying(fill.IdWriter, "cut", before=before)
        dying(vectors.VectorFile, "append", before=before)
        dying(carry, "write_numbers", before=before)
        dying(carry, "write_manifest", before=before)
        dying(carry, "clean", before=before)
    dying(fill, "clone", before=False)
    return lambda: count


def dies_everywhere(
    change: Callable[[Path], object],
    again: Callable[[Path], object],
    begin: Callable[[Path], object],
    tmp_path: Path,
    check_between: Callable[[Path], None],
    stride: int,
) -> None:
    """Kill a change at every `stride`-th step; what is left must be sound, and end the same."""
    straight = tmp_path / "straight"
    begin(straight)
    with pytest.MonkeyPatch.context() as patch:
        steps = killed_at(-1, patch)
        change(straight)
        total = steps()
    expected = seen(straight)
    assert total > 10
    for place in range(1, total + 1, stride):
        folder = tmp_path / f"killed-{place}"
        begin(folder)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(place, patch)
            with pytest.raises(KilledError):
                change(folder)
        gc.collect()  # a dead process holds no locks
        check_between(folder)
        again(folder)
        assert seen(folder) == expected, f"killed at step {place} of {total}"
        assert not (folder / UNFINISHED).exists()
        shutil.rmtree(folder)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_of_building(tmp_path: Path, stride: int) -> None:
    source = table(tmp_path / "t.tsv", texts(0, 30))
    choices = Choices(sizes=Sizes(batch=16, heap=15_000_000))

    def unfinished(folder: Path) -> None:
        if (folder / FILE).exists():
            Index(folder).close()
            return
        begun = (folder / UNFINISHED).exists()
        said = "is unfinished; go on with" if begun else "no index in|no such folder"
        with pytest.raises(ArtefactError, match=said):
            Index(folder)

    dies_everywhere(
        lambda folder: build(source, folder, Silent(), choices),
        lambda folder: build(source, folder, Silent(), choices, resume=True),
        lambda folder: None,
        tmp_path,
        unfinished,
        stride=stride,
    )


@pytest.mark.parametrize("stride", [17, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_step_of_adding_to_a_dense_index(
    tmp_path: Path, dense: Choices, stride: int
) -> None:
    first = table(tmp_path / "a.tsv", texts(0, 12))
    second = table(tmp_path / "b.tsv", texts(12, 30))
    build(first, tmp_path / "base", Silent(), dense)
    before = seen(tmp_path / "base")

    def opens(folder: Path) -> None:
        assert seen(folder).content in (before.content, after)

    add(second, Path(shutil.copytree(tmp_path / "base", tmp_path / "grown")), Silent(), SPARSE)
    after = seen(tmp_path / "grown").content
    dies_everywhere(
        lambda folder: add(second, folder, Silent(), SPARSE),
        lambda folder: add(second, folder, Silent(), SPARSE, resume=True),
        lambda folder: shutil.copytree(tmp_path / "base", folder),
        tmp_path,
        opens,
        stride=stride,
    )


def test_killed_twice_between_checkpoint_and_commit(tmp_path: Path) -> None:
    source = table(tmp_path / "t.tsv", texts(0, 30))
    build(source, tmp_path / "straight", Silent(), SPARSE)
    out = tmp_path / "killed"
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            commits = 0

            def dying(writer: Any, real: Any = fill.StoreWriter.commit) -> None:
                nonlocal commits
                commits += 1
                if commits == 2 or (out / "ids.ends").stat().st_size > 8 * 7:
                    raise KilledError
                real(writer)

            patch.setattr(fill.StoreWriter, "commit", dying)
            with pytest.raises(KilledError):
                build(source, out, Silent(), SPARSE, resume=True)
        gc.collect()
    build(source, out, Silent(), SPARSE, resume=True)
    assert seen(out) == seen(tmp_path / "straight")


@pytest.mark.parametrize("left", [1, 48 * 2 + 5, 48 * 4])
def test_killed_within_a_window_of_vectors(tmp_path: Path, dense: Choices, left: int) -> None:
    source = table(tmp_path / "t.tsv", texts(0, 18))
    build(source, tmp_path / "straight", Silent(), dense)
    out = tmp_path / "killed"
    with pytest.MonkeyPatch.context() as patch:

        def dying(file: vectors.VectorFile, rows: np.ndarray) -> None:
            real(file, rows)
            with (out / "vectors.float16").open("ab") as handle:
                handle.write(b"\x01" * left)
            raise KilledError

        real = vectors.VectorFile.append
        patch.setattr(vectors.VectorFile, "append", dying)
        with pytest.raises(KilledError):
            build(source, out, Silent(), dense)
    gc.collect()
    build(source, out, Silent(), dense, resume=True)
    assert seen(out) == seen(tmp_path / "straight")


def test_grown_and_pruned_equals_built_at_once(tmp_path: Path, dense: Choices) -> None:
    whole = table(tmp_path / "whole.tsv", texts(0, 30))
    build(whole, tmp_path / "once", Silent(), dense)
    build(table(tmp_path / "a.tsv", texts(0, 15)), tmp_path / "grown", Silent(), dense)
    add(table(tmp_path / "b.tsv", texts(15, 30)), tmp_path / "grown", Silent(), SPARSE)
    once, grown = seen(tmp_path / "once"), seen(tmp_path / "grown")
    assert once == grown, "ids, scores, vectors and content"

    add(table(tmp_path / "c.tsv", texts(30, 40)), tmp_path / "grown", Silent(), SPARSE)
    delete([f"p{n}" for n in range(30, 40)], tmp_path / "grown", Silent())
    pruned = seen(tmp_path / "grown")
    assert (pruned.content, pruned.passages) == (once.content, once.passages)
    assert pruned.dense == once.dense
    # BM25 counts deleted passages in its statistics until their segment is merged: the same
    # passages are found, with scores that differ a little.
    with Index(tmp_path / "grown") as index, Index(tmp_path / "once") as other:
        found, expected = (i.sparse().search(QUESTIONS, 40) for i in (index, other))
    for q in range(len(QUESTIONS)):
        scores = dict(zip(expected.ids[q], expected.scores[q], strict=True))
        assert scores.keys() == set(found.ids[q])
        for passage, score in zip(found.ids[q], found.scores[q], strict=True):
            assert score == pytest.approx(scores[passage], rel=0.25)


def test_a_deleted_passage_is_gone_and_its_id_free(tmp_path: Path, dense: Choices) -> None:
    source = table(tmp_path / "a.tsv", texts(0, 20))
    build(source, tmp_path / "index", Silent(), dense)
    manifest = delete(["p4", "p7", "p4"], tmp_path / "index", Silent())
    assert (manifest.passages, manifest.rows) == (18, 20)
    with Index(tmp_path / "index") as index:
        with pytest.raises(DataError, match="p4"):
            index.passages(["p4"])
        found = index.dense().search(QUESTIONS, 20).ids + index.sparse().search(QUESTIONS, 20).ids
        assert not {"p4", "p7"} & {i for row in found for i in row}
    changed = Passage("p4", "anew", "omega")
    add(table(tmp_path / "b.tsv", [changed]), tmp_path / "index", Silent())
    with Index(tmp_path / "index") as index:
        assert index.passages(["p4"]) == [changed]
        assert index.sparse().search(["omega"], 5).ids == [["p4"]]
        assert "p4" in index.dense().search(["omega"], 19).ids[0]
    with pytest.raises(DataError, match="no passage with the id 'p7'"):
        delete(["p7"], tmp_path / "index", Silent())
    with pytest.raises(DataError, match="these are all passages"):
        delete([f"p{n}" for n in range(20) if n != 7], tmp_path / "index", Silent())


def test_a_document_is_deleted_by_its_path(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("Sentence of a. " * 100)
    (folder / "b.txt").write_text("Sentence of b. " * 10)
    build(folder, tmp_path / "index", Silent())
    assert delete(["a.txt"], tmp_path / "index", Silent()).passages == 1
    with Index(tmp_path / "index") as index:
        assert index.passages(["b.txt#1"])[0].source == "b.txt"
    (tmp_path / "a.txt").write_text("A new a.")
    assert add(tmp_path / "a.txt", tmp_path / "index", Silent()).passages == 2


def test_dense_is_added_later(tmp_path: Path, dense: Choices) -> None:
    source = table(tmp_path / "a.tsv", texts(0, 20))
    build(source, tmp_path / "both", Silent(), dense)
    build(source, tmp_path / "later", Silent(), SPARSE)
    with (
        pytest.raises(ArtefactError, match="no dense half; make it with"),
        Index(tmp_path / "later") as index,
    ):
        index.dense()
    delete(["p3"], tmp_path / "later", Silent())
    make_dense(tmp_path / "later", Silent(), dense)
    delete(["p3"], tmp_path / "both", Silent())
    assert seen(tmp_path / "later").dense == seen(tmp_path / "both").dense
    assert make_dense(tmp_path / "later", Silent(), dense, resume=True).generation == 3
    with pytest.raises(ArtefactError, match="dense already"):
        make_dense(tmp_path / "later", Silent(), dense)


def test_every_damaged_or_missing_file_is_refused_by_name(tmp_path: Path, dense: Choices) -> None:
    built = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 20)), built, Silent(), dense)
    delete(["p5"], built, Silent())
    for name, facts in read_manifest(built).files.items():
        path = built / name
        content = path.read_bytes()
        for damaged, said in (
            (content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
            (content[: len(content) // 2], "not whole"),
            (None, "missing"),
        ):
            if not content:
                continue
            path.unlink()  # not in place: the file may be mapped
            if damaged is not None:
                path.write_bytes(damaged)
            with pytest.raises(ArtefactError, match=said) as caught:
                Index(built)
            assert str(path) in str(caught.value)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        assert facts.bytes == len(content)
    Index(built).close()
    with (built / "ids.utf8").open("ab") as file:
        file.write(b"what a killed --add wrote")
    Index(built).close()


def test_sizes_alone_are_checked_where_asked(tmp_path: Path) -> None:
    built = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 20)), built, Silent(), SPARSE)
    content = (built / "ids.utf8").read_bytes()
    (built / "ids.utf8").write_bytes(content[:-1] + b"?")
    Index(built, checksums=False).close()
    (built / "ids.utf8").write_bytes(content[:-1])
    with pytest.raises(ArtefactError, match="not whole"):
        Index(built, checksums=False)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}', ""])
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    build(table(tmp_path / "a.tsv", texts(0, 5)), tmp_path / "index", Silent(), SPARSE)
    (tmp_path / "index" / FILE).write_text(text)
    with pytest.raises(ArtefactError, match=r"manifest\.json: "):
        Index(tmp_path / "index")


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    source = table(tmp_path / "a.tsv", texts(0, 5))
    build(source, tmp_path / "index", Silent(), SPARSE)
    before = files(tmp_path / "index")
    with pytest.raises(ArtefactError, match="an index is there; grow it with --add"):
        build(source, tmp_path / "index", Silent(), SPARSE)
    watch = Silent()
    build(source, tmp_path / "index", watch, SPARSE, resume=True)
    assert watch.notes == [f"{tmp_path / 'index'}: the index is finished; nothing to resume"]
    assert files(tmp_path / "index") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("precious")
    with pytest.raises(ArtefactError, match="the folder is not empty"):
        build(source, tmp_path / "other", Silent(), SPARSE)
    for change in (
        lambda out: add(source, out, Silent()),
        lambda out: delete(["p1"], out, Silent()),
        lambda out: finish(out, Silent()),
        Index,
    ):
        with pytest.raises(ArtefactError, match="no such folder"):
            change(tmp_path / "none")
        assert not (tmp_path / "none").exists()


def test_bad_passages_leave_nothing_or_what_can_go_on(tmp_path: Path) -> None:
    good = texts(0, 20)
    source = table(tmp_path / "a.tsv", [*good, good[3]])
    for folder, sizes in (("all", Sizes()), ("batches", SIZES)):
        out = tmp_path / folder
        with pytest.raises(DataError, match=r"a\.tsv:22: duplicate id 'p3'"):
            build(source, out, Silent(), Choices(sizes=sizes))
        # Nothing was committed with the large batch: the folder is free again.
        assert (out / UNFINISHED).exists() == (folder == "batches")
    with pytest.raises(ArtefactError, match="unfinished"):
        build(source, tmp_path / "batches", Silent(), SPARSE)
    table(source, good)  # mended: what was read before is as it was
    build(source, tmp_path / "all", Silent(), SPARSE)
    build(source, tmp_path / "batches", Silent(), SPARSE, resume=True)
    assert seen(tmp_path / "all") == seen(tmp_path / "batches")


def test_a_source_that_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    good = texts(0, 20)
    source = table(tmp_path / "a.tsv", [*good, good[3]])
    with pytest.raises(DataError, match="duplicate"):
        build(source, tmp_path / "index", Silent(), SPARSE)
    for changed in ([*good[1:], good[0]][:15], good[:5], [Passage("new", "", "x"), *good[1:]]):
        table(source, changed)
        with pytest.raises(DataError, match="changed since the unfinished index was begun"):
            build(source, tmp_path / "index", Silent(), SPARSE, resume=True)
    table(source, [*good, good[3]])
    other = table(tmp_path / "b.tsv", good)
    with pytest.raises(ArtefactError, match=r"what is unfinished is .*a\.tsv, not .*b\.tsv"):
        build(other, tmp_path / "index", Silent(), SPARSE, resume=True)


def test_ids_that_are_in_the_index_are_not_added_again(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 20)), out, Silent(), SPARSE)
    before = files(out)
    with pytest.raises(DataError, match=r"b\.tsv:7: id 'p5' is in the index; delete it first"):
        add(table(tmp_path / "b.tsv", [*texts(50, 55), texts(5, 6)[0]]), out, Silent(), SPARSE)
    assert files(out).keys() == before.keys()
    assert seen(out).passages == 20


def test_whatever_is_unfinished_is_finished(tmp_path: Path, dense: Choices) -> None:
    """Deleting and making dense, killed and finished by a call that names neither."""
    base = tmp_path / "base"
    build(table(tmp_path / "a.tsv", texts(0, 20)), base, Silent(), SPARSE)
    for name, change in (
        ("deleted", lambda folder: delete(["p3", "p9"], folder, Silent())),
        ("dense", lambda folder: make_dense(folder, Silent(), dense)),
    ):
        straight = Path(shutil.copytree(base, tmp_path / name))
        change(straight)
        for place in (6, 9, 11):  # the first two are of cleaning up, before it is begun
            killed = Path(shutil.copytree(base, tmp_path / f"{name}-{place}"))
            with pytest.MonkeyPatch.context() as patch:
                killed_at(place, patch)
                with pytest.raises(KilledError):
                    change(killed)
            gc.collect()
            Index(killed).close()
            finish(killed, Silent())
            assert seen(killed) == seen(straight)


def test_an_unfinished_change_can_be_given_up(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 20)), out, Silent(), SPARSE)
    bad = table(tmp_path / "b.tsv", [*texts(20, 40), *texts(5, 6)])
    with pytest.raises(DataError, match="'p5' is in the index"):
        add(bad, out, Silent(), SPARSE)
    assert seen(out).passages == 20
    for change in (
        lambda: add(table(tmp_path / "c.tsv", texts(50, 55)), out, Silent(), SPARSE),
        lambda: delete(["p1"], out, Silent()),
    ):
        with pytest.raises(ArtefactError, match=r"unfinished \(add of .*b\.tsv\)"):
            change()
    abandon(out, Silent())
    assert not (out / UNFINISHED).exists()
    add(table(tmp_path / "c.tsv", texts(20, 25)), out, Silent(), SPARSE)
    build(table(tmp_path / "d.tsv", texts(0, 25)), tmp_path / "once", Silent(), SPARSE)
    assert seen(out) == seen(tmp_path / "once")
    abandon(out, Silent())  # nothing is unfinished: nothing changes
    assert seen(out) == seen(tmp_path / "once")


def test_what_a_change_that_was_given_up_has_written_is_not_taken_up(
    tmp_path: Path, dense: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its vectors would stand beside the passages of the next change, its ids behind the files."""
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 20)), out, Silent(), dense)
    before = files(out)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for end in (lambda: (out / UNFINISHED).unlink(), lambda: abandon(out, Silent())):
        with monkeypatch.context() as patch:
            patch.setattr(carry, "write_manifest", killed)
            with pytest.raises(KeyboardInterrupt):
                add(table(tmp_path / "b.tsv", texts(20, 33)), out, Silent(), SPARSE)
        assert (out / "vectors.float16").stat().st_size > len(before["vectors.float16"])
        end()
    assert files(out) == before
    add(table(tmp_path / "c.tsv", texts(50, 63)), out, Silent(), SPARSE)
    every = [*texts(0, 20), *texts(50, 63)]
    build(table(tmp_path / "d.tsv", every), tmp_path / "once", Silent(), dense)
    assert seen(out).vectors == seen(tmp_path / "once").vectors
    delete(["p1"], out, Silent())
    with Index(out):  # checks sizes and hashes
        pass


def test_more_passages_than_there_are_can_be_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(table(tmp_path / "t.tsv", texts(0, 20)), out, Silent(), SPARSE)
    with Index(out) as index:
        many, all_of_them = (index.sparse().search(["alpha"], k) for k in (10**10, 20))
    assert many == all_of_them


def test_nothing_to_index(tmp_path: Path) -> None:
    source = table(tmp_path / "a.tsv", [])
    with pytest.raises(DataError, match=r"a\.tsv: holds no passages"):
        build(source, tmp_path / "index", Silent())
    with pytest.raises(DataError, match="no such file"):
        build(tmp_path / "none.tsv", tmp_path / "other", Silent())
    assert not (tmp_path / "other").exists()
    table(source, texts(0, 3))
    build(source, tmp_path / "index", Silent())


def test_a_disk_that_is_too_small_is_refused_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda _: usage)
    watch = Silent()
    with pytest.raises(ShouldersError, match=r"the disk has 1\.0 kB free, the index needs about"):
        build(table(tmp_path / "a.tsv", texts(0, 900)), tmp_path / "index", watch, SPARSE)
    assert "passages; needs" in watch.notes[0]
    assert not (tmp_path / "index").exists()


def test_one_process_changes_an_index_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 5)), out, Silent(), SPARSE)
    with only_writer(out), pytest.raises(ShouldersError, match="another process writes"):
        delete(["p1"], out, Silent())
    assert delete(["p1"], out, Silent()).passages == 4


def test_an_open_index_does_not_change(tmp_path: Path) -> None:
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 12)), out, Silent(), SPARSE)
    with Index(out) as index:
        before = index.sparse().search(QUESTIONS, 10)
        add(table(tmp_path / "b.tsv", texts(12, 30)), out, Silent(), SPARSE)
        delete(["p1"], out, Silent())
        assert index.sparse().search(QUESTIONS, 10) == before
        assert index.passages(["p1"]) == [texts(1, 2)[0]]


def test_another_encoder_is_refused(tmp_path: Path, dense: Choices, encoder: Path) -> None:
    from shoulders.encoders.sentence import load_sentence_encoder

    own = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    choice = DenseChoice(question=str(own), passage=str(own))
    out = tmp_path / "index"
    build(table(tmp_path / "a.tsv", texts(0, 8)), out, Silent(), Choices(choice, sizes=SIZES))
    shutil.rmtree(own)
    save_tiny_encoder(own, seed=5)
    with Index(out) as index:
        with pytest.raises(ArtefactError, match="is not the one of its vectors"):
            index.dense()
        assert index.dense(load_sentence_encoder(str(encoder))).search(["alpha"], 2).ids
    with pytest.raises(ArtefactError, match="not the one that made this index's vectors"):
        add(table(tmp_path / "b.tsv", texts(8, 9)), out, Silent())
    assert np.fromfile(out / "vectors.float16", "<f2").size == 8 * 24


def test_vectors_of_two_encoders_are_not_mixed(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while encoding, and resumed with the encoder trained again."""
    own = Path(shutil.copytree(encoder, tmp_path / "encoder"))
    choices = Choices(DenseChoice(question=str(own), passage=str(own)), sizes=SIZES)
    source, out = table(tmp_path / "a.tsv", texts(0, 20)), tmp_path / "index"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vectors.VectorFile, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            build(source, out, Silent(), choices)
    shutil.rmtree(own)
    save_tiny_encoder(own, seed=5)
    with pytest.raises(ArtefactError, match="its first vectors were made by"):
        build(source, out, Silent(), choices, resume=True)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tantivy", None)
    store.analyzer.cache_clear()
    with pytest.raises(ShouldersError, match=r"tantivy is not installed; run: pip install -e"):
        build(table(tmp_path / "a.tsv", texts(0, 8)), tmp_path / "index", Silent())
