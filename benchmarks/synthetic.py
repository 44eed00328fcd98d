"""Synthetic passages, questions and vectors of any number: seeded, made as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY = 1_000_000  # words there are; Zipf's law with exponent 1 over them
WORDS = 100  # of a passage
QUESTION_WORDS = 8
DIMENSIONS = 384
_CLUSTERS = 2000
_LATENT = 64  # directions in which a cluster spreads; those of a real encoder are as few
_BLOCK = 20_000


def write_passages(path: Path, count: int, seed: int) -> int:
    """Write `count` passages as DPR's table; return the bytes of their texts and titles."""
    source = np.random.default_rng([seed, 0])
    written = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("id\ttext\ttitle\n")
        for first in range(0, count, _BLOCK):
            drawn = _ranks(source, (min(_BLOCK, count - first), WORDS))
            for number, row in enumerate(drawn.tolist(), first):
                # No stemmer takes anything off a number.
                text = "w" + " w".join(map(str, row))
                title = f"w{row[0]} w{row[-1]}"
                written += len(text) + len(title)
                file.write(f"{number}\t{text}\t{title}\n")
    return written


def questions(count: int, seed: int) -> list[str]:
    """Return questions whose words are as frequent as those of the passages."""
    drawn = _ranks(np.random.default_rng([seed, 1]), (count, QUESTION_WORDS))
    return ["w" + " w".join(map(str, row)) for row in drawn.tolist()]


def vectors(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield blocks `[b, DIMENSIONS]` float16 of vectors of length 1, in clusters."""
    centres, basis = _clusters(seed)
    source = np.random.default_rng([seed, 2])
    for first in range(0, count, _BLOCK):
        yield _points(source, centres, basis, min(_BLOCK, count - first)).astype(np.float16)


def question_vectors(count: int, seed: int) -> np.ndarray:
    """Return vectors `[count, DIMENSIONS]` float32 from the same clusters, none of a passage."""
    centres, basis = _clusters(seed)
    return _points(np.random.default_rng([seed, 3]), centres, basis, count)


def _ranks(source: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    cumulative = np.cumsum(1 / np.arange(1, VOCABULARY + 1))
    return np.searchsorted(cumulative, source.random(shape) * cumulative[-1])


def _clusters(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return centres `[c, e]` of length 1, and the directions `[l, e]` of what differs inside."""
    source = np.random.default_rng([seed, 4])
    centres = source.normal(size=(_CLUSTERS, DIMENSIONS)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    basis = source.normal(size=(_LATENT, DIMENSIONS)).astype(np.float32)
    basis /= np.linalg.norm(basis, axis=1, keepdims=True)
    return centres, basis / np.sqrt(np.arange(1, _LATENT + 1, dtype=np.float32))[:, None]


def _points(
    source: np.random.Generator, centres: np.ndarray, basis: np.ndarray, count: int
) -> np.ndarray:
    points = centres[source.integers(len(centres), size=count)]
    points += 0.4 * source.standard_normal((count, _LATENT), dtype=np.float32) @ basis
    points += 0.01 * source.standard_normal((count, DIMENSIONS), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)
