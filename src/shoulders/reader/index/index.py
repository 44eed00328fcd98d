"""Opening an index: passages by id, and its retrievers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from shoulders.errors import ArtefactError
from shoulders.reader.index.ids import Ids
from shoulders.reader.index.manifest import DenseFacts, read_manifest, verify
from shoulders.reader.index.numbers import read_numbers
from shoulders.reader.index.store import ANALYZER, PassageStore
from shoulders.reader.index.vectors import VectorFile, vectors_name
from shoulders.reader.passage import Passage, Retriever
from shoulders.reader.retrievers.sparse import SparseRetriever

if TYPE_CHECKING:
    from shoulders.encoders.sentence import SentenceEncoder
    from shoulders.reader.retrievers.approximate import ApproximateRetriever
    from shoulders.reader.retrievers.dense import DenseRetriever, Embed
    from shoulders.reader.retrievers.hybrid import HybridRetriever

KINDS = ("sparse", "dense", "approximate", "hybrid")


class Index:
    """A finished index, opened for reading; a `Collection`. Changes made meanwhile are not seen.

    Attributes:
        folder: where it lies.
        manifest: what it holds.
    """

    def __init__(self, folder: Path, *, checksums: bool = True) -> None:
        """Open and verify the index in `folder`.

        Args:
            folder: of the index.
            checksums: compare every byte with the manifest (about a second for each GB); else
                only the files' sizes.

        Raises:
            ArtefactError: there is none, it is unfinished, or a file is missing or damaged.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        try:
            verify(folder, self.manifest, checksums=checksums)
        except ArtefactError:
            # Another process may have finished a change since the manifest was read.
            again = read_manifest(folder)
            if again.generation == self.manifest.generation:
                raise
            self.manifest = again
            verify(folder, self.manifest, checksums=checksums)
        if self.manifest.analyzer != ANALYZER:
            raise ArtefactError(
                f"{folder}: its words are divided otherwise ({self.manifest.analyzer}); "
                "build the index again"
            )
        self._store = PassageStore(folder / self.manifest.store)
        self._ids = Ids(folder, self.manifest.rows)
        self._encoder: SentenceEncoder | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.manifest.passages

    def close(self) -> None:
        """Let go of the mapped files."""
        self._store.close()

    def passages(self, ids: Sequence[str]) -> list[Passage]:
        """Return the passages in the order of their ids; `DataError` names an unknown one."""
        return self._store.passages(ids)

    def windows(self, size: int) -> Iterator[tuple[list[Passage], np.ndarray | None]]:
        """Yield all passages in the order of their numbers, and their vectors `[n, e]` if any.

        At most `size` at a time: memory does not grow with the index.
        """
        vectors = self._vectors() if self.manifest.dense is not None else None
        for first in range(0, self.manifest.rows, size):
            numbered = self._store.between(first, min(first + size, self.manifest.rows))
            if numbered:
                rows = [number for number, _ in numbered]
                yield [p for _, p in numbered], None if vectors is None else vectors[rows]

    def sparse(self) -> SparseRetriever:
        """Return BM25."""
        return SparseRetriever(self._store, self._ids)

    def dense(self, encoder: SentenceEncoder | None = None) -> DenseRetriever:
        """Return exact dense retrieval.

        Args:
            encoder: of questions; by default the index's own is loaded (once).

        Raises:
            ArtefactError: the index has no vectors, or `encoder` is another than theirs.
            LMError: the encoder cannot be loaded.
        """
        from shoulders.reader.retrievers.dense import DenseRetriever

        embed = self._embed(encoder)
        return DenseRetriever(self._vectors(), embed, self._ids, self._deleted())

    def approximate(
        self, encoder: SentenceEncoder | None = None, *, probes: int | None = None
    ) -> ApproximateRetriever:
        """Return approximate dense retrieval; `probes` is how many of its lists are searched."""
        from shoulders.reader.retrievers.approximate import ApproximateRetriever

        if self.manifest.approximate is None:
            raise ArtefactError(
                f"{self.folder}: no approximate index; make it with: shoulders index "
                f"--approximate --out {self.folder}"
            )
        path = self.folder / self.manifest.approximate
        embed = self._embed(encoder)
        return ApproximateRetriever(
            path, self._vectors(), embed, self._ids, self._deleted(), probes=probes
        )

    def hybrid(self, encoder: SentenceEncoder | None = None) -> HybridRetriever:
        """Return the reciprocal-rank fusion of BM25 and the dense half (approximate if it is)."""
        from shoulders.reader.retrievers.hybrid import HybridRetriever

        found = self.approximate if self.manifest.approximate else self.dense
        return HybridRetriever([self.sparse(), found(encoder)])

    def retriever(self, kind: str | None = None) -> Retriever:
        """Return the retriever of a kind of `KINDS`; by default the best that the index has."""
        kind = kind or ("hybrid" if self.manifest.dense else "sparse")
        if kind not in KINDS:
            raise ArtefactError(f"retriever {kind}: use one of {', '.join(KINDS)}")
        made: Retriever = getattr(self, kind)()
        return made

    def _embed(self, encoder: SentenceEncoder | None) -> Embed:
        from shoulders.reader.index.asking import question_encoder

        facts = self._dense_facts().question
        if encoder is None:
            encoder = self._encoder = self._encoder or question_encoder(facts, self.folder)
        return question_encoder(facts, self.folder, encoder).questions

    def _vectors(self) -> np.ndarray:
        facts = self._dense_facts()
        path = self.folder / vectors_name(facts.dtype)
        return VectorFile(path, facts.dimensions, facts.dtype).mapped(self.manifest.rows)

    def _deleted(self) -> list[int]:
        return read_numbers(self.folder, self.manifest.deleted)

    def _dense_facts(self) -> DenseFacts:
        if self.manifest.dense is None:
            raise ArtefactError(
                f"{self.folder}: no dense half; make it with: shoulders index --dense "
                f"--out {self.folder}"
            )
        return self.manifest.dense
