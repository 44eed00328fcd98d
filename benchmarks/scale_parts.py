"""The parts of `scale.py`, each run in a process of its own, so that its memory is its own.

    .venv/bin/python benchmarks/scale_parts.py PART SETTING.json

Each prints one JSON object. Times are of this process alone: `seconds` on the clock, and
`cpu_seconds` of the processor, which other work on the machine does not lengthen as much.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import synthetic
from measuring import WARM, bytes_of, rated, searched, timed
from shoulders.reader.passage import Retriever

K = 100
_BATCH = 64


class Setting:
    """What all parts are told: sizes, seed, and the folder that they share."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.folder = Path(values["folder"])
        self.passages: int = values["passages"]
        self.vectors: int = values["vectors"]
        self.seed: int = values["seed"]
        self.queries: int = values["queries"]
        self.seconds: float = values["seconds_per_measurement"]
        self.encoded: int = values["encoded"]
        self.table = self.folder / "passages.tsv"
        natural = values["encoded_table"]
        self.encoded_table = Path(natural) if natural else self.table

    def questions(self) -> list[str]:
        """Return the questions of every sparse search."""
        return synthetic.questions(self.queries + WARM, self.seed)

    def mapped(self) -> np.ndarray:
        """Return the vectors as an index maps them."""
        return self._file().mapped(self.vectors)

    def _file(self) -> Any:
        from shoulders.reader.index.vectors import VectorFile

        return VectorFile(self.folder / "vectors.float16", synthetic.DIMENSIONS, "float16")

    def write_vectors(self) -> None:
        """Write vectors and ids as an index does."""
        from shoulders.reader.index.ids import IdWriter

        self._file().cut(0)
        ids = IdWriter(self.folder)
        ids.cut(0)
        first = 0
        for block in synthetic.vectors(self.vectors, self.seed):
            self._file().append(block)
            ids.append(map(str, range(first, first + len(block))))
            first += len(block)


def source(setting: Setting) -> dict[str, Any]:
    """Write the passages."""
    with timed() as facts:
        facts["text_bytes"] = synthetic.write_passages(
            setting.table, setting.passages, setting.seed
        )
    return facts


def sparse_build(setting: Setting) -> dict[str, Any]:
    """Build our own index, from the table to the manifest."""
    from shoulders.reader.index.build import build
    from shoulders.reader.watch import Silent

    with timed() as facts:
        manifest = build(setting.table, setting.folder / "index", Silent())
    return facts | rated(facts, manifest.passages, manifest.bytes)


def sparse_serve(setting: Setting) -> dict[str, Any]:
    """Search our own index by BM25."""
    from shoulders.reader.index.index import Index

    with timed() as opening:
        index = Index(setting.folder / "index", checksums=False)
    retriever = index.sparse()
    found, facts = searched(one(retriever), setting.questions(), setting.seconds)
    keep(setting, "sparse", found)
    return {"opening_seconds": opening["seconds"], **facts}


def bm25s_build(setting: Setting) -> dict[str, Any]:
    """Build a bm25s index as its documentation does: all texts, tokens, index, save."""
    import bm25s

    from shoulders.reader.collections.source import open_source

    with timed() as facts:
        read = open_source(setting.table).read(lambda _: None)
        texts = [f"{s.passage.title}\n{s.passage.text}" for s in read]
        tokens = bm25s.tokenize(texts, stopwords=None, show_progress=False)
        del texts
        index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
        index.index(tokens, show_progress=False)
        index.save(setting.folder / "bm25s")
    return facts | rated(facts, setting.passages, bytes_of(setting.folder / "bm25s"))


def bm25s_serve(setting: Setting) -> dict[str, Any]:
    """Search by bm25s, its arrays memory-mapped."""
    import bm25s

    with timed() as opening:
        index = bm25s.BM25.load(setting.folder / "bm25s", mmap=True)

    def search(question: str) -> list[str]:
        tokens = bm25s.tokenize([question], stopwords=None, show_progress=False)
        numbers, _ = index.retrieve(tokens, k=min(K, setting.passages), show_progress=False)
        return [str(n) for n in numbers[0].tolist()]

    found, facts = searched(search, setting.questions(), setting.seconds)
    keep(setting, "bm25s", found)
    return {"opening_seconds": opening["seconds"], **facts}


def engine_build(setting: Setting) -> dict[str, Any]:
    """Load the passages into LanceDB."""
    from shoulders.reader.engines.loading import load
    from shoulders.reader.watch import Silent

    where = setting.folder / "lance"
    with timed() as facts:
        count = load(setting.table, str(where), Silent())
    return facts | rated(facts, count, bytes_of(where))


def engine_serve(setting: Setting) -> dict[str, Any]:
    """Search by LanceDB's BM25."""
    from shoulders.reader.engines.lance import LanceTable

    with timed() as opening:
        table = LanceTable(str(setting.folder / "lance"))
    retriever = table.sparse()
    found, facts = searched(one(retriever), setting.questions(), setting.seconds)
    keep(setting, "engine", found)
    return {"opening_seconds": opening["seconds"], **facts}


def vectors(setting: Setting) -> dict[str, Any]:
    """Write the vectors, as an index keeps them: what exact search needs."""
    with timed() as facts:
        setting.write_vectors()
    size = sum(bytes_of(setting.folder / n) for n in ("vectors.float16", "ids.utf8", "ids.ends"))
    return facts | rated(facts, setting.vectors, size)


def dense_serve(setting: Setting) -> dict[str, Any]:
    """Search our own exact retriever, one question and many at a time."""
    from shoulders.reader.index.ids import Ids
    from shoulders.reader.retrievers.dense import DenseRetriever

    wanted = synthetic.question_vectors(setting.queries + WARM, setting.seed)
    ids = Ids(setting.folder, setting.vectors)
    retriever = DenseRetriever(setting.mapped(), by_number(wanted), ids)
    found, facts = searched(one(retriever), numbered(wanted), setting.seconds)
    keep(setting, "exact", found)
    with timed() as batch:
        retriever.search(numbered(wanted)[:_BATCH], K)
    many = min(_BATCH, len(wanted))
    return {**facts, f"queries_per_second_{many}_at_once": many / batch["seconds"]}


def approximate_build(setting: Setting) -> dict[str, Any]:
    """Train and write the compressed index of the vectors."""
    from shoulders.reader.retrievers.approximate import write

    path = setting.folder / "approximate.faiss"
    with timed() as facts:
        write(path, setting.mapped(), [], lambda _: None)
    return facts | rated(facts, setting.vectors, bytes_of(path))


def approximate_serve(setting: Setting) -> dict[str, Any]:
    """Search the compressed index."""
    from shoulders.reader.index.ids import Ids
    from shoulders.reader.retrievers.approximate import ApproximateRetriever

    wanted = synthetic.question_vectors(setting.queries + WARM, setting.seed)
    ids = Ids(setting.folder, setting.vectors)
    path = setting.folder / "approximate.faiss"
    retriever = ApproximateRetriever(path, setting.mapped(), by_number(wanted), ids)
    found, facts = searched(one(retriever), numbered(wanted), setting.seconds)
    keep(setting, "approximate", found)
    return facts


def product(setting: Setting) -> dict[str, Any]:
    """Search by one plain product with all vectors, in memory as float32."""
    wanted = synthetic.question_vectors(setting.queries + WARM, setting.seed)
    matrix = np.empty((setting.vectors, synthetic.DIMENSIONS), np.float32)
    matrix[:] = setting.mapped()

    def search(question: str) -> list[str]:
        scores = matrix @ wanted[int(question)]
        k = min(K, len(scores))
        best = np.argpartition(-scores, k - 1)[:k]
        return [str(n) for n in best[np.argsort(-scores[best])].tolist()]

    found, facts = searched(search, numbered(wanted), setting.seconds)
    keep(setting, "product", found)
    return facts


def encoder(setting: Setting) -> dict[str, Any]:
    """Encode some passages with the embedded encoder: what a dense build waits for."""
    from shoulders.encoders.sentence import load_sentence_encoder
    from shoulders.reader.collections.source import open_source

    model = load_sentence_encoder()
    read = open_source(setting.encoded_table).read(lambda _: None)
    titled = [(s.passage.title, s.passage.text) for s in islice(read, setting.encoded)]
    model.passages(titled[:8])
    with timed() as facts:
        model.passages(titled)
    with timed() as asking:
        model.questions(["when was the first station of the line opened?"])
    tokens = model.encoder.tokenizer([f"{t}. {x}" for t, x in titled])["input_ids"]
    return {
        **facts,
        "passages": len(titled),
        "passages_per_second": len(titled) / facts["seconds"],
        "passages_per_cpu_second": len(titled) / facts["cpu_seconds"],
        "tokens_per_passage": float(
            np.mean([min(len(t), model.config.max_tokens) for t in tokens])
        ),
        "seconds_per_question": asking["seconds"],
    }


def one(retriever: Retriever) -> Callable[[str], list[str]]:
    """Return a search for one question."""
    return lambda question: retriever.search([question], K).ids[0]


def numbered(wanted: np.ndarray) -> list[str]:
    """Return questions that `by_number` gives these vectors."""
    return [str(n) for n in range(len(wanted))]


def by_number(wanted: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    """Return an encoder that takes no time."""
    return lambda texts: wanted[[int(t) for t in texts]]


def keep(setting: Setting, name: str, found: list[list[str]]) -> None:
    """Write what was found, for comparisons."""
    (setting.folder / f"found-{name}.json").write_text(json.dumps(found))


PARTS = (
    *(source, sparse_build, sparse_serve, bm25s_build, bm25s_serve, engine_build, engine_serve),
    *(vectors, dense_serve, product, approximate_build, approximate_serve, encoder),
)


def main() -> None:
    """Run one part."""
    part = next(part for part in PARTS if part.__name__ == sys.argv[1])
    facts = part(Setting(json.loads(Path(sys.argv[2]).read_text())))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({**facts, "peak_rss": int(status["VmHWM"].split()[0]) * 1024}))


if __name__ == "__main__":
    main()
