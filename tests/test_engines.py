"""LanceDB, on a local disk, against our own index over the same passages."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoulders.cli.app import main
from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.reader.engines import lance
from shoulders.reader.engines.lance import LanceTable, is_lance
from shoulders.reader.engines.loading import load
from shoulders.reader.engines.opening import open_passages
from shoulders.reader.index.build import Choices, build, delete
from shoulders.reader.index.index import Index
from shoulders.reader.index.plan import DenseChoice, Sizes
from shoulders.reader.passage import Found, Passage, Retriever
from shoulders.reader.watch import Silent
from tiny_models import save_tiny_encoder, save_tiny_lm

# Its wheel takes 190 MB on the disk, so that it is no part of `dev`.
pytest.importorskip("lancedb", reason="pip install -e '.[engine]'")

WORDS = [f"{stem}{end}" for stem in ("run", "walk", "café", "x1") for end in ("", "s", "ning")]
QUESTIONS = [
    *("running", "Runs, walks!", "café rare7", "the rare40 the rare40", "rare12 rare90", "rare299"),
    *("cafe", "x1 and rare3", "zebra"),
]


def write_table(path: Path, count: int, seed: int = 0) -> Path:
    source = np.random.default_rng(seed)
    words = [*WORDS, "the", "and", *(f"rare{n}" for n in range(300))]
    chances = 1 / np.arange(1, len(words) + 1)
    rows = ["id\ttext\ttitle"]
    for n in range(count):
        text = " ".join(source.choice(words, source.integers(3, 90), p=chances / chances.sum()))
        rows.append(f"it's {n}\t{text}\t{'' if n % 5 == 0 else f'Title {n % 9}'}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a table of 1,500 passages, our index of it less two, and LanceDB's of that."""
    folder = tmp_path_factory.mktemp("engines")
    table = write_table(folder / "t.tsv", 1500)
    encoder = str(save_tiny_encoder(folder / "encoder"))
    choices = Choices(DenseChoice(question=encoder, passage=encoder), sizes=Sizes(batch=400))
    build(table, folder / "index", Silent(), choices)
    delete(["it's 3", "it's 800"], folder / "index", Silent())
    count = load(folder / "index", str(folder / "lance"), Silent(), approximate=True)
    assert count == 1498
    return table, folder / "index", folder / "lance"


@pytest.fixture(scope="module")
def both(made: tuple[Path, Path, Path]) -> Iterator[tuple[Index, LanceTable]]:
    with Index(made[1]) as ours, open_passages(str(made[2])) as theirs:
        assert isinstance(theirs, LanceTable)
        assert len(ours) == len(theirs) == 1498
        yield ours, theirs


def assert_same(ours: Found, theirs: Found, tolerance: float) -> None:
    """Equal scores by rank, and equal passages where scores are apart by more than tolerance."""
    for ids, scores, other_ids, other_scores in zip(*ours, *theirs, strict=True):
        assert other_scores == pytest.approx(scores, rel=tolerance)
        known = dict(zip(ids, scores, strict=True))
        for passage, score in zip(other_ids, other_scores, strict=True):
            edge = scores[-1] * (1 + tolerance)
            assert known.get(passage, edge) == pytest.approx(score, rel=2 * tolerance)


@pytest.mark.parametrize("k", [1, 20, 400, 5000])
def test_sparse_is_our_bm25(both: tuple[Index, LanceTable], k: int) -> None:
    """The same words and formula; only ours rounds lengths to one byte, as Lucene does."""
    ours, theirs = (index.sparse().search(QUESTIONS, k) for index in both)
    assert [len(ids) for ids in ours.ids] == [len(ids) for ids in theirs.ids]
    assert [bool(ids) for ids in theirs.ids] == [True] * 6 + [False, True, False]
    assert all(0 < s < math.inf for row in theirs.scores for s in row)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert b == pytest.approx(a, rel=0.05)
    everything = [
        dict(zip(*row, strict=True))
        for row in zip(*both[0].sparse().search(QUESTIONS, 5000), strict=True)
    ]
    for known, ids, scores in zip(everything, *theirs, strict=True):
        assert scores == pytest.approx([known[i] for i in ids], rel=0.05)
    if k >= 20:
        shares = [len({*a} & {*b}) / len(a) for a, b in zip(ours.ids, theirs.ids, strict=True) if a]
        assert np.mean(shares) > 0.9, shares


@pytest.mark.parametrize("k", [1, 20, 1498, 5000])
def test_dense_is_our_exact_search(both: tuple[Index, LanceTable], k: int) -> None:
    ours, theirs = (index.dense().search(QUESTIONS, k) for index in both)
    for a, b, ids, other_ids in zip(ours.scores, theirs.scores, ours.ids, theirs.ids, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5)
        known = dict(zip(ids, a, strict=True))
        # Sums in another order: equal scores may differ in the last bit, and change places.
        np.testing.assert_allclose([known[i] for i in other_ids], b, rtol=1e-5)
    if k <= 20:
        assert ours.ids == theirs.ids


def test_approximate_and_hybrid(both: tuple[Index, LanceTable]) -> None:
    exact = both[1].dense().search(QUESTIONS, 10)
    near = both[1].retriever("approximate").search(QUESTIONS, 10)
    shares = [len(set(a) & set(b)) / 10 for a, b in zip(exact.ids, near.ids, strict=True)]
    assert np.mean(shares) > 0.9
    for row in near.scores:
        assert row == sorted(row, reverse=True)
    mixed = both[1].retriever().search(QUESTIONS, 5)
    assert [len(row) for row in mixed.ids] == [5] * len(QUESTIONS)


def test_passages_by_id(both: tuple[Index, LanceTable]) -> None:
    ours, theirs = both
    ids = ["it's 1499", "it's 0", "it's 7", "it's 0"]
    assert theirs.passages(ids) == ours.passages(ids)
    assert theirs.passages([]) == []
    for unknown in ("nobody", "it's 3", "' OR 1=1 --"):
        with pytest.raises(DataError, match="no passage with the id"):
            theirs.passages(["it's 0", unknown])


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=60))
def test_any_question_is_only_words(both: tuple[Index, LanceTable], question: str) -> None:
    found = both[1].sparse().search([question, f"zebra {question}"], 3)
    assert found.ids[0] == found.ids[1]


@pytest.mark.parametrize("question", ['"run walk', "run AND NOT walk", "words:run", "r* OR ("])
def test_query_syntax_means_nothing(both: tuple[Index, LanceTable], question: str) -> None:
    ours, theirs = (index.sparse().search([question], 10) for index in both)
    assert_same(ours, theirs, 0.05)


def test_empty_and_endless_questions(both: tuple[Index, LanceTable]) -> None:
    sparse = both[1].sparse()
    assert sparse.search(["", "?!", "zebra"], 5) == Found([[], [], []], [[], [], []])
    for kind in lance.KINDS:
        retriever: Retriever = both[1].retriever(kind)
        assert retriever.search([], 5) == Found([], [])
        with pytest.raises(ValueError, match="k is 0"):
            retriever.search(["run"], 0)
    endless = " ".join(f"zz{n}" for n in range(3000)) + " café"
    assert sparse.search([endless], 5).ids == sparse.search(["café"], 5).ids


def test_equal_scores_keep_the_order_of_the_collection(tmp_path: Path) -> None:
    rows = [f"id{n}\tcommon word of {('many', 'few')[n % 2]}\t" for n in range(90)]
    (tmp_path / "t.tsv").write_text("id\ttext\ttitle\n" + "\n".join(rows), encoding="utf-8")
    load(tmp_path / "t.tsv", str(tmp_path / "lance"), Silent())
    with LanceTable(str(tmp_path / "lance")) as table:
        for k in (1, 5, 40, 90, 200):
            found = table.retriever().search(["common"], k)
            assert found.ids == [[f"id{n}" for n in range(90)][:k]]
        with pytest.raises(ArtefactError, match="no vectors"):
            table.dense()
        with pytest.raises(ArtefactError, match="no approximate index"):
            table.approximate()
        with pytest.raises(ArtefactError, match="use one of"):
            table.retriever("best")


def test_a_folder_of_documents(tmp_path: Path) -> None:
    encoder = str(save_tiny_encoder(tmp_path / "encoder"))
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# Cats\n\nCats sleep for most of the day.")
    (docs / "b.txt").write_text("Dogs bark at night.")
    watch = Silent()
    where = str(tmp_path / "lance")
    choice = DenseChoice(question=encoder, passage=encoder)
    assert load(docs, where, watch, dense=choice, approximate=True) == 2
    assert "needs at least 1,000 passages" in watch.notes[0]
    with LanceTable(where) as table:
        assert table.sparse().search(["sleeping cat"], 5).ids == [["a.md#1"]]
        assert len(table.retriever().search(["cats"], 5).ids[0]) == 2
        (cats,) = table.passages(["a.md#1"])
    assert isinstance(cats, Passage)
    assert (cats.title, cats.source) == ("Cats", "a.md")
    assert cats.text.endswith("day.")


def test_refusals(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    table, index, there = made
    with pytest.raises(ArtefactError, match="holds a table 'passages' already"):
        load(table, str(there), Silent())
    with pytest.raises(ArtefactError, match="brings its own vectors"):
        load(index, str(tmp_path / "a"), Silent(), dense=DenseChoice())
    with pytest.raises(ArtefactError, match="needs vectors"):
        load(table, str(tmp_path / "a"), Silent(), approximate=True)
    where = tmp_path / "lance"
    twice, broken, empty = (tmp_path / f"{name}.tsv" for name in ("twice", "broken", "empty"))
    write_table(twice, 3000)
    with twice.open("a") as file:
        file.write("it's 77\tagain\t\n")
    broken.write_text("id\ttext\ttitle\n" + "1\ta\tb\n2\tc\n")
    empty.write_text("id\ttext\ttitle\n")
    for source, said in (
        (twice, r"twice.tsv:3002: duplicate id 'it's 77', first at .*twice.tsv:79"),
        (broken, "broken.tsv:3: 2 columns, expected 3"),
        (empty, "holds no passages"),
    ):
        with pytest.raises(DataError, match=said):
            load(source, str(where), Silent())
        assert not is_lance(str(where)), "nothing is kept"
        with pytest.raises(ArtefactError, match="no index in this folder"):
            open_passages(str(where))
    assert load(table, str(where), Silent()) == 1500


def test_an_unfinished_table_is_refused(
    made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = str(tmp_path / "lance")
    load(made[0], where, Silent())
    lance.connected(where).open_table(lance.TABLE).drop_index(lance.WORDS_INDEX)
    with pytest.raises(ArtefactError, match="not loaded to the end"):
        open_passages(where)
    monkeypatch.setitem(sys.modules, "lancedb", None)
    with pytest.raises(ShouldersError, match=r"pip install -e '\.\[engine\]'"):
        open_passages(where)


@pytest.mark.parametrize(
    "name", ["data/*.lance", "_indices/*/*invert.lance", "_versions/*.manifest"]
)
def test_a_half_copied_table_is_refused_by_name(
    made: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    where = tmp_path / "lance"
    shutil.copytree(made[2], where)
    for file in (where / "passages.lance").glob(name):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ShouldersError) as refused, LanceTable(str(where)) as table:
        table.passages(table.sparse().search(["rare7"], 20).ids[0])
    assert str(refused.value).startswith(f"{where}: LanceDB: ")
    assert ".rs:" not in str(refused.value)


def test_another_encoder_is_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from shoulders.encoders.sentence import load_sentence_encoder

    other = load_sentence_encoder(str(save_tiny_encoder(tmp_path / "other", seed=1)))
    with LanceTable(str(made[2])) as table, pytest.raises(ArtefactError, match="is not the one"):
        table.dense(other)


def test_later_changes_are_not_seen(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    where = str(tmp_path / "lance")
    load(made[0], where, Silent())
    with LanceTable(where) as before:
        found = before.sparse().search(["the"], 5000)
        lance.connected(where).open_table(lance.TABLE).delete("number < 1000")
        assert len(before) == 1500
        assert before.sparse().search(["the"], 5000) == found
    with LanceTable(where) as after:
        assert len(after) == 500
        found = after.sparse().search(["run the and"], 5000).ids[0]
        assert {int(i.removeprefix("it's ")) for i in found} <= set(range(1000, 1500))


def test_by_the_command_line(
    made: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def shoulders(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["shoulders", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capfd.readouterr()

    where, dumped = tmp_path / "lance", tmp_path / "answer.json"
    code, out, err = shoulders("index", made[0], "--into", where)
    assert (code, out) == (0, f"1,500 passages in {where}\n"), err
    assert shoulders("index", made[0], "--into", where)[0] == 2
    lm = save_tiny_lm(tmp_path / "lm")
    asked = shoulders(
        *("ask", "rare7?", "--index", where, "--lm", lm, "--window", 40, "--json", dumped)
    )
    assert asked[0] == 0, asked[2]
    best = LanceTable(str(where)).sparse().search(["rare7?"], 1).ids[0][0]
    assert f'"{best}"' in dumped.read_text()
    data, card = tmp_path / "q.jsonl", tmp_path / "card.json"
    data.write_text('{"question": "rare7", "answers": ["rare7"]}\n')
    code, _, err = shoulders(
        *("eval", "base", "--index", where, "--lm", lm, "--window", 40),
        *("--data", data, "--json", card),
    )
    assert code == 0, err
    assert json.loads(card.read_text())["metrics"]["retrieved_answer_hit_at_1"] == 100
    code, _, err = shoulders("ask", "x", "--index", "nowhere://a/b", "--lm", lm)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: nowhere://a/b: LanceDB: ")


def test_folders_and_uris() -> None:
    assert is_lance("s3://bucket/folder")
    assert is_lance("db://name")
    assert not is_lance("runs/nothing")
