"""Running text as examples: what a Connector is pretrained on, and perplexity is measured on."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shoulders.data.batching import length_grouped
from shoulders.errors import DataError
from shoulders.lm.frozen import FrozenLM
from shoulders.skills.config import BATCH_ROWS, BATCH_TOKENS
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example
from shoulders.training.step import losses_of

TASK = "text"
LINES = 4096  # that are tokenized at once: their tokens are Python's numbers for a while


class RunningText:
    """Chunks of text in an order of which position i is a pure function of (seed, i).

    Every chunk is met once before any is met twice.

    Args:
        lm: whose tokens are counted.
        files: UTF-8 text.
        chunk: tokens of one example; what is left at a file's end makes a shorter one.
        seed: of the order.

    Raises:
        DataError: names a file that cannot be read as text, or holds too little.
    """

    def __init__(self, lm: FrozenLM, files: Sequence[str], chunk: int, seed: int = 0) -> None:
        self._seed = seed
        self._start = lm.start_ids
        self.chunks = [c for name in files for c in chunks_of(lm, Path(name), chunk)]
        self._order: tuple[int, np.ndarray] | None = None  # of the last epoch that was asked for

    def example(self, position: int) -> Example:
        """Return the example at a position of the endless order."""
        epoch, place = divmod(position, len(self.chunks))
        if self._order is None or self._order[0] != epoch:
            key = hashlib.sha256(repr((self._seed, "text", epoch)).encode()).digest()
            draws = np.random.PCG64(int.from_bytes(key)).random_raw(len(self.chunks))
            self._order = epoch, np.argsort(draws, kind="stable")
        return self._example(self.chunks[int(self._order[1][place])])

    def examples(self, most: int | None = None) -> list[Example]:
        """Return the chunks in the order of the files; of many, `most` spread evenly."""
        count = len(self.chunks)
        wanted = count if most is None else min(most, count)
        return [self._example(self.chunks[i * count // wanted]) for i in range(wanted)]

    def _example(self, chunk: np.ndarray) -> Example:
        first, *others = chunk.tolist()
        return Example("", input_ids=[*self._start, first], answer_ids=others, task=TASK)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a skill predicts a text.

    Attributes:
        value: `exp` of the mean negative log-likelihood per predicted token.
        tokens: predicted ones.
        loss: that mean, in nats.
    """

    value: float
    tokens: int
    loss: float


def perplexity(
    skill: Skill, examples: Sequence[Example], *, on_rows: Callable[[int], None] | None = None
) -> Perplexity:
    """Return the perplexity of chunks of text, each read without what stood before it."""
    total, tokens = 0.0, 0
    for rows in length_grouped([e.tokens for e in examples], BATCH_TOKENS, BATCH_ROWS):
        with torch.no_grad():
            losses = losses_of(skill, [examples[i] for i in rows])
        total, tokens = total + float(losses.double().sum()), tokens + len(losses)
        if on_rows is not None:
            on_rows(len(rows))
    return Perplexity(math.exp(total / tokens), tokens, total / tokens)


def chunks_of(lm: FrozenLM, file: Path, chunk: int) -> list[np.ndarray]:
    """Return a file's tokens in chunks, int32.

    Raises `DataError` for what is no text, or too short.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; check the path in the recipe")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not valid UTF-8 at byte {error.start + 1}; save the file as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot read: {error.strerror or error}") from error
    # By paragraphs: tokenizers take quadratic time for very long texts.
    lines = text.splitlines(keepends=True)
    parts = [
        np.fromiter(itertools.chain.from_iterable(lm.tokenize(lines[at : at + LINES])), np.int32)
        for at in range(0, len(lines), LINES)
    ]
    ids = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    chunks = [ids[at : at + chunk] for at in range(0, len(ids), chunk)]
    if chunks and len(chunks[-1]) < 2:
        chunks.pop()
    if not chunks:
        raise DataError(f"{file}: has {len(ids)} tokens; running text needs two or more")
    return chunks
