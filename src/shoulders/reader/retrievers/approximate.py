"""Dense retrieval for scale: compressed vectors in memory, the best of them compared exactly.

The index is an inverted file with product quantisation (IVF-PQ; Jégou, Douze and Schmid 2011) of
faiss: one byte for eight dimensions. It proposes candidates, whose exact vectors are then read
from the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.errors import ArtefactError, DataError
from shoulders.files import atomic_path
from shoulders.reader.index.ids import Ids
from shoulders.reader.libraries import needed
from shoulders.reader.passage import Found
from shoulders.reader.retrievers.dense import Embed

LEAST = 1000  # passages; with fewer, exact search is fast and the codes cannot be learned
_SAMPLE = 200_000  # vectors at most that the codes are learned from
_PER_LIST = 64  # vectors of the sample for each list, at least
_BLOCK = 16_384  # rows that are read at once
_QUESTIONS = 256
_GROWN = 4  # times what it was trained on, after which training anew pays


class ApproximateRetriever:
    """Candidates by compressed vectors, ranked by the exact inner products."""

    def __init__(
        self,
        path: Path,
        vectors: np.ndarray,
        embed: Embed,
        ids: Ids,
        deleted: Sequence[int] = (),
        *,
        probes: int | None = None,
        candidates: int = 4,
    ) -> None:
        """Open the approximate index in the file `path`.

        Args:
            path: as `write` made it.
            vectors: the exact ones, `[rows, e]`, by number.
            embed: questions to vectors `[q, e]`.
            ids: by number.
            deleted: numbers that are not to be found.
            probes: how many lists are searched: more find more and take longer. Default: an
                eighth of all, at least 16.
            candidates: how many times `k` passages are compared exactly (100 at least).

        Raises:
            ArtefactError: the file cannot be read.
        """
        faiss = needed("faiss")
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise ArtefactError(f"{path}: not a readable approximate index") from error
        self._vectors, self._embed, self._ids = vectors, embed, ids
        self._candidates = candidates
        probes = probes or max(self._index.nlist // 8, 16)
        # Kept: faiss does not hold what it points to.
        self._kept = [np.asarray(sorted(deleted), dtype=np.int64)]
        self._selectors = [faiss.IDSelectorBatch(self._kept[0])]
        self._selectors.append(faiss.IDSelectorNot(self._selectors[0]))
        self._settings = faiss.SearchParametersIVF(
            nprobe=min(probes, self._index.nlist),
            **({"sel": self._selectors[1]} if len(deleted) else {}),
        )

    def search(self, questions: Sequence[str], k: int) -> Found:
        """Return `k` passages for each question, nearly always the nearest ones."""
        if k < 1:
            raise ValueError(f"k is {k}, must be at least 1")
        ids, scores = [], []
        for start in range(0, len(questions), _QUESTIONS):
            wanted = self._embed(questions[start : start + _QUESTIONS])
            for numbers, found in self.nearest(wanted, k):
                ids.append(self._ids.take(numbers.tolist()))
                scores.append(found.tolist())
        return Found(ids, scores)

    def nearest(self, wanted: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return numbers and exact scores, best first, for each row of `wanted` `[q, e]`."""
        wanted = np.ascontiguousarray(wanted, dtype=np.float32)
        depth = min(max(k * self._candidates, 100), int(self._index.ntotal))
        _, proposed = self._index.search(wanted, depth, params=self._settings)
        results = []
        for vector, numbers in zip(wanted, proposed, strict=True):
            numbers = np.sort(numbers[numbers >= 0])
            scores = self._vectors[numbers].astype(np.float32) @ vector
            order = np.argsort(-scores, kind="stable")[:k]  # equal scores stay by number
            results.append((numbers[order], scores[order]))
        return results


def write(
    path: Path,
    vectors: np.ndarray,
    deleted: Sequence[int],
    advance: Callable[[int], None],
    *,
    grown_from: Path | None = None,
    first: int = 0,
) -> str | None:
    """Write the approximate index of `vectors` `[rows, e]` to `path`, atomically.

    Args:
        path: of the file.
        vectors: by number.
        deleted: numbers that are left out.
        advance: is told how many rows are in.
        grown_from: an approximate index of the rows before `first`, which is added to.
        first: number of the first row that is added.

    Returns:
        A note for the user, or None.

    Raises:
        DataError: there are too few vectors.
    """
    faiss = needed("faiss")
    gone = np.asarray(sorted(deleted), dtype=np.int64)
    if grown_from is not None:
        index = faiss.read_index(str(grown_from))
    else:
        index = _trained(faiss, vectors, gone)
    for start in range(first, len(vectors), _BLOCK):
        numbers = np.setdiff1d(np.arange(start, min(start + _BLOCK, len(vectors))), gone)
        index.add_with_ids(_rows(vectors, numbers), numbers.astype(np.int64))
        advance(len(numbers))
    with atomic_path(path) as temporary:
        faiss.write_index(index, str(temporary))
    if len(vectors) > _GROWN * index.nlist * _PER_LIST and grown_from is not None:
        return "the approximate index has outgrown its training; a new index would be faster"
    return None


def too_few(count: int) -> str:
    """Say why there is no approximate index of so few passages."""
    return (
        f"an approximate index needs at least {LEAST:,} passages, here are {count:,}; exact "
        "search is fast with so few"
    )


def _trained(faiss: Any, vectors: np.ndarray, gone: np.ndarray) -> Any:
    """Return an empty index whose lists and codes are learned from an even sample."""
    rows, width = vectors.shape
    live = rows - len(gone)
    if live < LEAST:
        raise DataError(too_few(live))
    # Some lists for each root of the rows; no more than the sample can place.
    lists = int(min(4 * rows**0.5, min(live, _SAMPLE) / _PER_LIST))
    wanted = min(live, max(lists * _PER_LIST, 256 * _PER_LIST), _SAMPLE)
    numbers = np.setdiff1d(np.linspace(0, rows - 1, wanted).astype(np.int64), gone)
    codes = next(n for n in range(max(width // 8, 1), 0, -1) if width % n == 0)
    index = faiss.IndexIVFPQ(
        faiss.IndexFlatIP(width), width, lists, codes, 8, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.min_points_per_centroid = 1  # it warns on standard output otherwise
    index.pq.cp.min_points_per_centroid = 1
    index.train(_rows(vectors, numbers))
    return index


def _rows(vectors: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors[numbers], dtype=np.float32)
