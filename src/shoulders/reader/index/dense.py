"""The dense stage of a change: passages become vectors, window by window."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shoulders.errors import ArtefactError
from shoulders.reader.index.manifest import DenseFacts, EncoderFacts, Manifest
from shoulders.reader.index.plan import DenseChoice, Plan
from shoulders.reader.index.store import PassageStore
from shoulders.reader.index.vectors import VectorFile, vectors_name
from shoulders.reader.retrievers.approximate import LEAST, too_few
from shoulders.reader.retrievers.approximate import write as write_approximate
from shoulders.reader.watch import Watch

if TYPE_CHECKING:
    from shoulders.encoders.sentence import SentenceEncoder


class DenseStage:
    """The encoder of passages, loaded before anything is written, and the vectors' file."""

    def __init__(self, choice: DenseChoice, base: Manifest | None) -> None:
        """Load the encoders.

        Raises:
            LMError: one cannot be loaded.
            ArtefactError: the index has vectors of another encoder.
        """
        from shoulders.encoders.sentence import load_sentence_encoder

        self._encoder = load_sentence_encoder(choice.passage, pooling=choice.pooling)
        question = self._encoder
        if choice.question != choice.passage:
            question = load_sentence_encoder(choice.question, pooling=choice.pooling)
        self.facts = DenseFacts(
            question=encoder_facts(question),
            passage=encoder_facts(self._encoder),
            dimensions=self._encoder.dimensions,
            dtype=choice.dtype,
        )
        if question.dimensions != self._encoder.dimensions:
            raise ArtefactError(
                f"encoders {choice.question} and {choice.passage}: vectors of "
                f"{question.dimensions} and {self._encoder.dimensions} dimensions do not fit"
            )
        if base is not None and base.dense is not None and base.dense != self.facts:
            raise ArtefactError(
                f"encoder {choice.passage}: not the one that made this index's vectors "
                "(its fingerprint or settings differ)"
            )

    @property
    def file(self) -> str:
        """Name of the vectors' file."""
        return vectors_name(self.facts.dtype)

    def encode(
        self, out: Path, plan: Plan, base: Manifest | None, store: str, rows: int, watch: Watch
    ) -> None:
        """Append the vectors of all passages up to number `rows` that have none.

        Windows begin at the same numbers in a run that was killed, and a window is written at
        once: every passage is encoded in the same company, so its vector is the same.
        """
        if plan.vectors is None:
            plan.vectors = self.facts
            plan.save(out)
        elif plan.vectors != self.facts:
            raise ArtefactError(
                f"{out}: its first vectors were made by {plan.vectors.passage.name} as it was then "
                "(its fingerprint or settings differ now); give this change up, and begin again"
            )
        file = VectorFile(out / self.file, self.facts.dimensions, self.facts.dtype)
        start = base.rows if base is not None and base.dense is not None else 0
        done = max(file.rows, start)
        if done < rows:
            done = start + (done - start) // plan.sizes.window * plan.sizes.window
        done = min(done, rows)
        file.cut(done)
        with (
            PassageStore(out / store) as there,
            watch.stage("vectors", rows - start, done - start) as advance,
        ):
            for first in range(done, rows, plan.sizes.window):
                last = min(first + plan.sizes.window, rows)
                numbered = there.between(first, last)
                vectors = np.zeros((last - first, self.facts.dimensions), dtype=np.float32)
                if numbered:  # the vector of a deleted passage stays zero
                    texts = [(p.title, p.text) for _, p in numbered]
                    places = [number - first for number, _ in numbered]
                    vectors[places] = self._encoder.passages(texts, advance)
                file.append(vectors)

    def approximate(
        self,
        out: Path,
        plan: Plan,
        base: Manifest | None,
        deleted: list[int],
        rows: int,
        watch: Watch,
    ) -> str | None:
        """Write the approximate index of all vectors; return the name of its file.

        With too few passages for one it is left out, and noted: exact search does as well.
        A change that adds no vectors keeps the file there is: deleted numbers are left out by the
        search. Begins anew after a kill; it takes a small part of the time of encoding.
        """
        had = base.approximate if base is not None else None
        if base is not None and had is not None and base.rows == rows:
            return had
        if had is None and rows - len(deleted) < LEAST:
            watch.note(too_few(rows - len(deleted)))
            return None
        name = f"approximate-{plan.generation:04}.faiss"
        vectors = VectorFile(out / self.file, self.facts.dimensions, self.facts.dtype).mapped(rows)
        first = base.rows if base is not None and had is not None else 0
        with watch.stage("approximate index", rows - first) as advance:
            note = write_approximate(
                out / name,
                vectors,
                deleted,
                advance,
                grown_from=out / had if had is not None else None,
                first=first,
            )
        if note is not None:
            watch.note(note)
        return name


def encoder_facts(encoder: SentenceEncoder) -> EncoderFacts:
    """Return what must be the same for vectors to be comparable."""
    config = encoder.config
    return EncoderFacts(
        name=encoder.encoder.name,
        fingerprint=encoder.encoder.fingerprint,
        pooling=config.pooling,
        normalize=config.normalize,
        pair=config.pair,
        max_tokens=config.max_tokens,
        question_prompt=config.question_prompt,
        passage_prompt=config.passage_prompt,
    )
