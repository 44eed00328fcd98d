"""`unfinished.json`: what is being done to an index, so that a killed process can be followed.

An index is changed beside itself: files of the next generation stand beside those of the present
one, which stay as they are until `manifest.json` names the new ones. Two files only grow (ids and
vectors); the manifest says how many of their bytes count.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shoulders.errors import ArtefactError
from shoulders.files import write_json
from shoulders.reader.index.manifest import UNFINISHED, DenseFacts


class DenseChoice(BaseModel):
    """Which encoders make vectors of texts, and how.

    Attributes:
        question: encoder of questions: `embedded`, a Hub id or a folder.
        passage: encoder of passages; often the same.
        pooling: `mean` or `cls`; None takes what the encoder's own folder says, else `mean`.
        dtype: of the vectors on disk.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str = "embedded"
    passage: str = "embedded"
    pooling: Literal["mean", "cls"] | None = None
    dtype: Literal["float16", "float32"] = "float16"


class Sizes(BaseModel):
    """How much is done at once; the defaults suit two cores and a few GB.

    Attributes:
        batch: passages between two commits: what a kill loses of the sparse half.
        window: passages that are encoded, sorted by length, and written together.
        heap: bytes of memory for the words of a batch; tantivy wants at least 15 MB.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = 20_000
    window: int = 2048
    heap: int = 128_000_000


class Checkpoint(BaseModel):
    """The `Content` of an index with the first `rows` numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    content: str


class Plan(BaseModel):
    """One change of an index.

    Attributes:
        operation: what it is.
        generation: that the change leads to.
        first: number of the first new passage.
        source: absolute path of what is added.
        given: the same as the user wrote it.
        kind: of the source.
        words: size of passages, of documents.
        deleted: ids that are deleted.
        dense: the dense half that is wanted, or None.
        vectors: what makes the vectors, from the first one on.
        approximate: an approximate index is wanted.
        checkpoints: the last two, newest last; one of them is what the store has committed.
        rows: number of rows when all passages are in, None before.
    """

    model_config = ConfigDict(extra="forbid")

    operation: Literal["build", "add", "delete", "dense"]
    generation: int
    first: int = 0
    source: str | None = None
    given: str | None = None
    kind: str | None = None
    words: int | None = None
    deleted: list[str] = []
    dense: DenseChoice | None = None
    vectors: DenseFacts | None = None
    approximate: bool = False
    sizes: Sizes = Sizes()
    checkpoints: list[Checkpoint]
    rows: int | None = None

    @property
    def store(self) -> str:
        """Folder of the passage store that this change writes."""
        return f"passages-{self.generation:04}"

    def checkpoint(self, rows: int, content: str) -> None:
        """Remember the content at `rows`, and the one before."""
        self.checkpoints = [*self.checkpoints[-1:], Checkpoint(rows=rows, content=content)]

    def content_at(self, rows: int) -> str | None:
        """Return the remembered content at `rows`."""
        return next((c.content for c in self.checkpoints if c.rows == rows), None)

    def save(self, folder: Path) -> None:
        """Write the plan, atomically."""
        write_json(folder / UNFINISHED, self.model_dump())


def read_plan(folder: Path) -> Plan | None:
    """Return what is unfinished in `folder`, or None."""
    path = folder / UNFINISHED
    if not path.is_file():
        return None
    try:
        return Plan.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        raise ArtefactError(f"{path}: damaged ({str(error).splitlines()[0]}); remove it") from error
