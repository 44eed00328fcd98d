"""The passages of an index and its sparse half: one tantivy index, memory-mapped.

Every passage has a number, its place in the order in which passages were added; numbers are
never used again. Dense vectors and ids are kept by number, and equal scores are ordered by it.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import unicodedata
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.reader.libraries import needed
from shoulders.reader.passage import Passage

MAX_ID = 2000  # bytes; tantivy leaves out terms of more than 65,530
MAX_TERM = 40  # bytes; longer runs of letters and digits are no words anybody asks for
LANGUAGE = "english"
_ANALYZER = "shoulders_words"
ANALYZER = f"simple, lowercase, {LANGUAGE} stems, at most {MAX_TERM} bytes"
# One thread writes, so that passages are committed in their order: what is there after a kill is
# a beginning of the source.
_THREADS = 1


class StoreWriter:
    """Adds and deletes passages; nothing is seen, or kept after a kill, before `commit`."""

    def __init__(self, folder: Path, heap_bytes: int) -> None:
        tantivy = needed("tantivy")
        self._folder = folder
        self._document = tantivy.Document
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            index = tantivy.Index(_schema(), path=str(folder))
            index.register_tokenizer(_ANALYZER, analyzer())
            self._writer = index.writer(heap_bytes, _THREADS)

    def add(self, number: int, passage: Passage) -> None:
        """Add one passage; its id must not be there yet (see `PassageStore.known`)."""
        document = self._document(
            id=passage.id,
            words=composed(f"{passage.title}\n{passage.text}"),
        )
        document.add_bytes("title", passage.title.encode())
        document.add_bytes("text", passage.text.encode())
        if passage.source:
            document.add_text("source", passage.source)
        document.add_unsigned("number", number)
        with _named(self._folder):
            self._writer.add_document(document)

    def delete(self, passage_id: str) -> None:
        """Delete the passage with this id."""
        with _named(self._folder):
            self._writer.delete_documents_by_term("id", passage_id)

    def commit(self) -> None:
        """Make what was added or deleted durable, all of it or nothing."""
        with _named(self._folder):
            self._writer.commit()

    def close(self) -> None:
        """Wait for merging segments and remove the files that nothing needs any longer."""
        with _named(self._folder):
            self._writer.garbage_collect_files()
            self._writer.wait_merging_threads()


class PassageStore:
    """Passages for reading: by id, by number, by words."""

    def __init__(self, folder: Path) -> None:
        tantivy = needed("tantivy")
        self._tantivy = tantivy
        self._unlink: weakref.finalize[..., PassageStore] | None = None
        opened = folder
        if not os.access(folder, os.W_OK):
            opened = _linked(folder)
            self._unlink = weakref.finalize(self, shutil.rmtree, opened, ignore_errors=True)
        try:
            index = tantivy.Index.open(str(opened))
            index.config_reader("manual")  # an index in use does not change under its user
            index.reload()
        except (ValueError, OSError) as error:
            raise ArtefactError(f"{folder}: not a readable passage store ({error})") from error
        self._schema = index.schema
        self._searcher = index.searcher()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files."""
        self._searcher = None
        if self._unlink is not None:
            self._unlink()

    @property
    def count(self) -> int:
        """Number of passages, deleted ones not counted."""
        return int(self._searcher.num_docs)

    @property
    def rows(self) -> int:
        """The highest number plus one; 0 where there is no passage."""
        query = self._tantivy.Query.all_query()
        hits = self._searcher.search(query, 1, count=False, order_by_field="number").hits
        return int(hits[0][0]) + 1 if hits else 0

    def search(self, words: Sequence[str], limit: int) -> list[tuple[float, int]]:
        """Return scores and numbers of the best passages by BM25, best first.

        Scores are Lucene's BM25 (k1 1.2, b 0.75, lengths rounded to one byte, terms that occur
        twice in `words` count twice) over title and text as one field. Equal scores are ordered
        by number. At most `limit`, fewer where fewer hold any of the words.
        """
        query = self._any_of(words)
        limit = min(limit, self.count)  # memory is taken for as many as are asked for
        fetch = limit + 8
        while True:
            hits = self._searcher.search(query, fetch, count=False).hits
            # Of passages with the last score, those with the lowest numbers are wanted, and the
            # search knows no numbers: all of them must be seen.
            if len(hits) < fetch or hits[-1][0] < hits[limit - 1][0]:
                break
            fetch *= 4
        numbers = self._numbers([address for _, address in hits])
        ranked = sorted(
            ((score, n) for (score, _), n in zip(hits, numbers, strict=True)),
            key=lambda hit: (-hit[0], hit[1]),
        )
        return ranked[:limit]

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        """Return the passages in the order of their ids; `DataError` names an unknown one."""
        return [self._by_id(passage_id)[1] for passage_id in ids]

    def number(self, passage_id: str) -> int:
        """Return the number of a passage; `DataError` where there is none with this id."""
        return self._numbers([self._by_id(passage_id)[0]])[0]

    def known(self, ids: Sequence[str]) -> str | None:
        """Return one of `ids` that is in the store, or None; fast for many ids at once."""
        query = self._tantivy.Query.term_set_query(self._schema, "id", list(ids))
        hits = self._searcher.search(query, 1, count=False).hits
        return _passage(self._searcher.doc(hits[0][1])).id if hits else None

    def of_source(self, source: str) -> list[str]:
        """Return the ids of all passages of one source, in the order of their numbers."""
        query = self._tantivy.Query.term_query(self._schema, "source", source, "basic")
        return [passage.id for _, passage in self._all(query, max(self._searcher.num_docs, 1))]

    def between(self, first: int, last: int) -> list[tuple[int, Passage]]:
        """Return numbers and passages with `first <= number < last`, by number."""
        query = self._tantivy.Query.range_query(
            self._schema,
            "number",
            self._tantivy.FieldType.Unsigned,
            first,
            last,
            include_upper=False,
        )
        return self._all(query, max(last - first, 1))

    def _all(self, query: Any, limit: int) -> list[tuple[int, Passage]]:
        hits = self._searcher.search(query, limit, count=False).hits
        addresses = [address for _, address in hits]
        numbered = zip(self._numbers(addresses), addresses, strict=True)
        return [(n, _passage(self._searcher.doc(a))) for n, a in sorted(numbered, key=_first)]

    def _by_id(self, passage_id: str) -> tuple[Any, Passage]:
        query = self._tantivy.Query.term_query(self._schema, "id", passage_id, "basic")
        hits = self._searcher.search(query, 1, count=False).hits
        if not hits:
            raise DataError(f"no passage with the id '{passage_id}'")
        return hits[0][1], _passage(self._searcher.doc(hits[0][1]))

    def _numbers(self, addresses: list[Any]) -> list[int]:
        return self._searcher.fast_field_values("number", addresses) if addresses else []

    def _any_of(self, words: Sequence[str]) -> Any:
        make, should = self._tantivy.Query, self._tantivy.Occur.Should
        times: dict[str, int] = {}
        for word in words:
            times[word] = times.get(word, 0) + 1
        clauses = []
        for word, count in times.items():
            term = make.term_query(self._schema, "words", word, "freq")
            clauses.append((should, make.boost_query(term, float(count)) if count > 1 else term))
        return make.boolean_query(clauses)


def _linked(folder: Path) -> Path:
    """Return a folder of links to the files of one that is only for reading.

    tantivy makes a lock file where it opens an index, which it cannot there.
    """
    links = Path(tempfile.mkdtemp(prefix="shoulders-"))
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.suffix != ".lock":  # of another day
            (links / file.name).symlink_to(file.resolve())
    return links


def composed(text: str) -> str:
    """Return a text as it is searched: accents and their letters are one character (NFC)."""
    return unicodedata.normalize("NFC", text)


@functools.cache
def analyzer() -> Any:
    """Return what divides a text into terms: letters and digits, lower case, English stems."""
    tantivy = needed("tantivy")
    make = tantivy.Filter
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for step in (make.remove_long(MAX_TERM), make.lowercase(), make.stemmer(LANGUAGE)):
        builder = builder.filter(step)
    return builder.build()


def _schema() -> Any:
    builder = needed("tantivy").SchemaBuilder()
    for name in ("id", "source"):
        builder.add_text_field(name, stored=True, tokenizer_name="raw", index_option="basic")
    for name in ("title", "text"):
        # Bytes, because tantivy-py indexes every text field: these are only stored.
        builder.add_bytes_field(name, stored=True, indexed=False)
    builder.add_text_field("words", tokenizer_name=_ANALYZER, index_option="freq")
    builder.add_unsigned_field("number", indexed=True, fast=True)
    return builder.build()


def _passage(document: Any) -> Passage:
    return Passage(
        document.get_first("id"),
        document.get_first("title").decode(),
        document.get_first("text").decode(),
        document.get_first("source") or "",
    )


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn tantivy's errors (a full disk, a lock) into one line that names the folder."""
    try:
        yield
    except (ValueError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise ShouldersError(f"{folder}: cannot write: {reason[0] if reason else error}") from error
