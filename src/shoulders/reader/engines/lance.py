"""LanceDB behind `Collection` and `Retriever`: one table on a disk, or in an object store.

The table is made by `engines.loading`. Words are divided as in our own index, so that BM25's
scores are the same up to what single precision and the rounding of lengths do; dense scores are
our own exact inner products of what the engine proposes. Equal scores are ordered by number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.reader.index.manifest import DenseFacts
from shoulders.reader.libraries import needed
from shoulders.reader.passage import Found, Passage, Retriever
from shoulders.reader.retrievers.hybrid import HybridRetriever

if TYPE_CHECKING:
    from shoulders.encoders.sentence import SentenceEncoder

EXTRA = "engine"
TABLE = "passages"
DENSE = b"shoulders.dense"  # in the schema's metadata: `DenseFacts` as JSON
WORDS_INDEX = "words_idx"
KINDS = ("sparse", "dense", "approximate", "hybrid")
_TEXTS = ["id", "title", "words", "source"]
_Hit = tuple[float, int, str]  # minus the score, number, id: they sort best first
_RUST = re.compile(r"(, \S+\.rs:\d+:\d+)+$")  # where in the engine's sources an error arose
_PROBES = 32  # lists of an approximate index that are searched
_CANDIDATES = 4  # times `k` that an approximate search compares exactly


def is_lance(where: str) -> bool:
    """Tell whether `where` names a LanceDB database: a URI, or a folder that holds our table."""
    return "://" in where or (Path(where) / f"{TABLE}.lance").is_dir()


class LanceTable:
    """A table of passages, opened for reading; a `Collection`. Later changes are not seen."""

    def __init__(self, uri: str) -> None:
        """Open the table.

        Args:
            uri: a folder, or what LanceDB connects to: `s3://`, `gs://`, `az://`, or `db://` with
                the key in the environment variable `LANCEDB_API_KEY`.

        Raises:
            ArtefactError: there is none, or its loading was never finished.
            ShouldersError: LanceDB is not installed, or cannot reach it.
        """
        self.uri = uri
        with named(uri):
            self._table: Any = table_of(connected(uri))
            if self._table is None:
                raise ArtefactError(f"{uri}: holds no table '{TABLE}'")
            self._table.checkout(self._table.version)
            self._indices = {index.name for index in self._table.list_indices()}
            found = (self._table.schema.metadata or {}).get(DENSE)
        if WORDS_INDEX not in self._indices:
            raise ArtefactError(f"{uri}: was not loaded to the end; remove it and load it again")
        self._facts = DenseFacts.model_validate_json(found) if found else None
        self._encoder: SentenceEncoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with named(self.uri):
            return int(self._table.count_rows())

    def close(self) -> None:
        """Let go of the table."""
        self._table = None

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        """Return the passages in the order of their ids; `DataError` names an unknown one."""
        wanted = list(dict.fromkeys(ids))
        if not wanted:
            return []
        listed = ", ".join("'" + passage_id.replace("'", "''") + "'" for passage_id in wanted)
        with named(self.uri):
            query = self._table.search().where(f"id IN ({listed})").limit(len(wanted))
            rows = query.select(_TEXTS).to_list()
        known = {row["id"]: _passage(row) for row in rows}
        for passage_id in wanted:
            if passage_id not in known:
                raise DataError(f"no passage with the id '{passage_id}'")
        return [known[passage_id] for passage_id in ids]

    def sparse(self) -> LanceSparse:
        """Return BM25."""
        return LanceSparse(self.uri, self._table)

    def dense(self, encoder: SentenceEncoder | None = None) -> LanceDense:
        """Return exact dense retrieval.

        Args:
            encoder: of questions; by default the table's own is loaded (once).

        Raises:
            ArtefactError: the table has no vectors, or `encoder` is another than theirs.
            LMError: the encoder cannot be loaded.
        """
        return LanceDense(self.uri, self._table, self._embed(encoder), exact=True)

    def approximate(self, encoder: SentenceEncoder | None = None) -> LanceDense:
        """Return approximate dense retrieval, by the engine's compressed vectors."""
        if "vector_idx" not in self._indices:
            raise ArtefactError(f"{self.uri}: no approximate index; load it with one")
        return LanceDense(self.uri, self._table, self._embed(encoder), exact=False)

    def retriever(self, kind: str | None = None) -> Retriever:
        """Return the retriever of a kind of `KINDS`; by default the best that the table has."""
        kind = kind or ("hybrid" if self._facts is not None else "sparse")
        if kind not in KINDS:
            raise ArtefactError(f"retriever {kind}: use one of {', '.join(KINDS)}")
        if kind == "hybrid":
            near = self.approximate if "vector_idx" in self._indices else self.dense
            return HybridRetriever([self.sparse(), near()])
        made: Retriever = getattr(self, kind)()
        return made

    def _embed(self, encoder: SentenceEncoder | None) -> Callable[[Sequence[str]], np.ndarray]:
        from shoulders.reader.index.asking import question_encoder

        if self._facts is None:
            raise ArtefactError(f"{self.uri}: no vectors; load it again with a dense half")
        if encoder is None:
            encoder = self._encoder = self._encoder or question_encoder(
                self._facts.question, self.uri
            )
        return question_encoder(self._facts.question, self.uri, encoder).questions


class LanceSparse:
    """BM25 by the engine. A question is only words: no sign in it has a meaning."""

    def __init__(self, uri: str, table: Any) -> None:
        self._uri, self._table = uri, table

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return at most `k` passages for each question (fewer where fewer share a word)."""
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        rows = [self._best(question, k) for question in questions]
        return _found(rows)

    def _best(self, question: str, k: int) -> list[_Hit]:
        match = needed("lancedb.query", EXTRA).MatchQuery(question, "words")
        fetch = k + 8
        while True:
            with named(self._uri):
                query = self._table.search(match).select(["id", "number", "_score"])
                hits = query.limit(fetch).to_list()
            best = sorted((-hit["_score"], hit["number"], hit["id"]) for hit in hits)
            # Among equals at the end those with the lowest numbers count: all must be seen.
            if len(hits) < fetch or best[-1][0] > best[k - 1][0]:
                return best[:k]
            fetch *= 4


class LanceDense:
    """Inner products: the engine proposes passages, their exact vectors are compared here.

    The engine rounds a question to float16 as it searches, which may decide the last places; a
    quarter more passages than wanted are compared, so that this is nearly never seen.
    """

    def __init__(
        self, uri: str, table: Any, embed: Callable[[Sequence[str]], np.ndarray], *, exact: bool
    ) -> None:
        self._uri, self._table, self._embed, self._exact = uri, table, embed, exact

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return `k` passages for each question (fewer where there are fewer)."""
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        rows = [self._best(vector, k) for vector in self._embed(questions)] if questions else []
        return _found(rows)

    def _best(self, vector: np.ndarray, k: int) -> list[_Hit]:
        with named(self._uri):
            query = self._table.search(vector, vector_column_name="vector").distance_type("dot")
            query = query.bypass_vector_index() if self._exact else query.nprobes(_PROBES)
            depth = k + max(k // 4, 16) if self._exact else max(k * _CANDIDATES, 100)
            hits = query.select(["id", "number", "vector", "_distance"]).limit(depth).to_arrow()
        vectors = hits["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        scores = vectors.astype(np.float32).reshape(len(hits), -1) @ vector
        places = zip(
            (-scores).tolist(), hits["number"].to_pylist(), hits["id"].to_pylist(), strict=True
        )
        return sorted(places)[:k]


def _found(rows: list[list[_Hit]]) -> Found:
    return Found(
        [[i for _, _, i in row] for row in rows], [[-s for s, _, _ in row] for row in rows]
    )


def connected(uri: str) -> Any:
    """Connect to the database at `uri`; a folder is made where there is none."""
    lancedb = needed("lancedb", EXTRA)
    if uri.startswith("db://"):
        return lancedb.connect(uri, api_key=os.environ.get("LANCEDB_API_KEY"))
    return lancedb.connect(uri)


def table_of(database: Any) -> Any | None:
    """Return our table, or None where there is none."""
    try:
        return database.open_table(TABLE)
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise


@contextmanager
def named(uri: str) -> Iterator[None]:
    """Turn the engine's errors into one line that names the database."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        reason = _RUST.sub("", (str(error).strip().splitlines() or [repr(error)])[0])
        raise ShouldersError(f"{uri}: LanceDB: {reason}") from error


def _passage(row: dict[str, Any]) -> Passage:
    # `words` is what BM25 reads, title and text: the text is not kept twice.
    title = row["title"]
    return Passage(row["id"], title, row["words"][len(title) + 1 :], row["source"])
