"""Loading passages into LanceDB: from a source, or from an index of ours with its vectors."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.errors import ArtefactError, DataError, ShouldersError
from shoulders.reader.collections.source import Note, Source, open_source
from shoulders.reader.engines.lance import (
    DENSE,
    EXTRA,
    TABLE,
    WORDS_INDEX,
    connected,
    named,
    table_of,
)
from shoulders.reader.index.index import Index
from shoulders.reader.index.manifest import FILE, DenseFacts
from shoulders.reader.index.plan import DenseChoice
from shoulders.reader.index.store import MAX_TERM
from shoulders.reader.libraries import needed
from shoulders.reader.passage import Passage
from shoulders.reader.retrievers.approximate import LEAST, too_few
from shoulders.reader.watch import Advance, Watch

_WINDOW = 2048  # passages in memory at once
_VALUES = 8  # of a vector for each byte of its code
_FTS_MEMORY = 1024  # MiB, of the build of the words' index

Window = tuple[list[Passage], np.ndarray | None]  # passages, their vectors [n, e]


def load(
    source: Path,
    uri: str,
    watch: Watch,
    *,
    dense: DenseChoice | None = None,
    approximate: bool = False,
    words: int | None = None,
) -> int:
    """Load passages into a new table of the database at `uri`; return how many there are.

    Memory does not grow with their number, but for eight bytes each that find duplicate ids.

    Args:
        source: an index of ours, whose vectors come along; or a file or folder, see `open_source`.
        uri: see `LanceTable`.
        watch: is told how far it is.
        dense: encoders that make vectors of a source that is no index.
        approximate: also an approximate index of the vectors (IVF-PQ, as in our own index).
        words: size of the passages that documents are cut into.

    Raises:
        DataError: a passage cannot be read, or an id stands there twice; nothing is kept.
        ArtefactError: there is a table already, or there are no vectors to index.
        ShouldersError: LanceDB is not installed, or cannot write.
    """
    if (source / FILE).is_file():
        if dense is not None:
            raise ArtefactError(f"{source}: an index brings its own vectors; leave out encoders")
        with Index(source) as index:
            facts = index.manifest.dense
            return _load(uri, index.windows(_WINDOW), facts, len(index), watch, approximate)
    opened = open_source(source, words=words)
    encoding = _Encoding(dense) if dense is not None else None
    windows = _windows(opened, watch.note, encoding)
    facts = encoding.facts if encoding is not None else None
    return _load(uri, windows, facts, opened.estimate().passages, watch, approximate)


def _load(
    uri: str,
    windows: Iterable[Window],
    facts: DenseFacts | None,
    guess: int,
    watch: Watch,
    approximate: bool,
) -> int:
    if approximate and facts is None:
        raise ArtefactError(f"{uri}: an approximate index needs vectors")
    schema = _schema(facts)
    refusals: list[ShouldersError] = []
    with named(uri):
        database = connected(uri)
        if table_of(database) is not None:
            raise ArtefactError(f"{uri}: holds a table '{TABLE}' already")
    try:
        with named(uri), watch.stage("passages", guess) as advance:
            batches = _batches(windows, schema, advance, refusals)
            table = database.create_table(TABLE, data=batches, schema=schema)
            count = int(table.count_rows())
        with named(uri), watch.stage("engine's indexes", 1) as advance:
            _index(table, count, facts, approximate, watch)
            advance(1)
    except BaseException:
        with named(uri):
            database.drop_table(TABLE, ignore_missing=True)
        if refusals:  # the engine hands on no more than the text of an error
            raise refusals[0] from None
        raise
    return count


def _index(
    table: Any, count: int, facts: DenseFacts | None, approximate: bool, watch: Watch
) -> None:
    kinds = needed("lancedb.index", EXTRA)
    table.create_index("id", config=kinds.BTree())
    if approximate and facts is not None:
        if count < LEAST:
            watch.note(too_few(count))
        else:
            codes = next(n for n in range(max(facts.dimensions // _VALUES, 1), 0, -1)
                         if facts.dimensions % n == 0)  # fmt: skip
            config = kinds.IvfPq(distance_type="dot", num_sub_vectors=codes)
            table.create_index("vector", config=config)
    # Last: a table with this index was loaded to the end.
    config = kinds.FTS(
        with_position=False,
        base_tokenizer="simple",
        language="English",
        max_token_length=MAX_TERM,
        lower_case=True,
        stem=True,
        remove_stop_words=False,
        ascii_folding=False,
        memory_limit=_FTS_MEMORY,
    )
    table.create_index("words", config=config, name=WORDS_INDEX)


def _batches(
    windows: Iterable[Window], schema: Any, advance: Advance, refusals: list[ShouldersError]
) -> Iterator[Any]:
    """Yield record batches; what is refused on the way is kept in `refusals`."""
    pa = needed("pyarrow", EXTRA)
    number = 0
    try:
        for passages, vectors in windows:
            columns = [
                pa.array([p.id for p in passages], pa.string()),
                pa.array(range(number, number + len(passages)), pa.int64()),
                pa.array([p.title for p in passages], pa.string()),
                pa.array([f"{p.title}\n{p.text}" for p in passages], pa.string()),
                pa.array([p.source for p in passages], pa.string()),
            ]
            if vectors is not None:
                kind = schema.field("vector").type
                flat = pa.array(vectors.astype(kind.value_type.to_pandas_dtype()).ravel())
                columns.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
            yield pa.record_batch(columns, schema=schema)
            number += len(passages)
            advance(len(passages))
        if not number:
            raise DataError("the source holds no passages")
    except ShouldersError as error:
        refusals.append(error)
        raise


def _schema(facts: DenseFacts | None) -> Any:
    pa = needed("pyarrow", EXTRA)
    fields = [pa.field("id", pa.string()), pa.field("number", pa.int64())]
    fields += [pa.field(name, pa.string()) for name in ("title", "words", "source")]
    if facts is None:
        return pa.schema(fields)
    kind = pa.float16() if facts.dtype == "float16" else pa.float32()
    fields.append(pa.field("vector", pa.list_(kind, facts.dimensions)))
    return pa.schema(fields, metadata={DENSE: facts.model_dump_json().encode()})


class _Encoding:
    """The encoder of passages, and what the table says of both encoders."""

    def __init__(self, choice: DenseChoice) -> None:
        from shoulders.encoders.sentence import load_sentence_encoder
        from shoulders.reader.index.dense import encoder_facts

        self.encoder = question = load_sentence_encoder(choice.passage, pooling=choice.pooling)
        if choice.question != choice.passage:
            question = load_sentence_encoder(choice.question, pooling=choice.pooling)
        if question.dimensions != self.encoder.dimensions:
            raise ArtefactError(
                f"encoders {choice.question} and {choice.passage}: vectors of "
                f"{question.dimensions} and {self.encoder.dimensions} dimensions do not fit"
            )
        self.facts = DenseFacts(
            question=encoder_facts(question),
            passage=encoder_facts(self.encoder),
            dimensions=self.encoder.dimensions,
            dtype=choice.dtype,
        )


def _windows(source: Source, note: Note, encoding: _Encoding | None) -> Iterator[Window]:
    seen = array("Q")
    sourced = source.read(note)
    while some := list(islice(sourced, _WINDOW)):
        seen.extend(_hash(s.passage.id) for s in some)
        vectors = None
        if encoding is not None:
            vectors = encoding.encoder.passages([(s.passage.title, s.passage.text) for s in some])
        yield [s.passage for s in some], vectors
    hashes, counts = np.unique(np.frombuffer(seen, np.uint64), return_counts=True)
    twice = set(hashes[counts > 1].tolist())
    if twice:
        _refuse_twice(source, twice)


def _refuse_twice(source: Source, twice: set[int]) -> None:
    """Raise `DataError` for the first id that stands there twice; hashes alone prove nothing."""
    places: dict[str, str] = {}
    for passage, place in source.read(lambda _: None):
        if _hash(passage.id) in twice:
            if passage.id in places:
                raise DataError(
                    f"{place}: duplicate id '{passage.id}', first at {places[passage.id]}"
                )
            places[passage.id] = place


def _hash(passage_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(passage_id.encode(), digest_size=8).digest(), "little")
