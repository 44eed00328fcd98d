"""LanceDB beside our own index on nq: the same passages, the same questions, answer-hit@k.

    .venv/bin/python benchmarks/engine.py

Builds the index, moves it into LanceDB, and searches both by BM25; with `--encoder embedded` also
by vectors (some minutes of encoding). Needs `pip install -e '.[engine]'`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shoulders.evaluation.metrics import bootstrap_interval
from shoulders.files import write_json
from shoulders.machine import machine
from shoulders.reader.answers import has_answer
from shoulders.reader.engines.lance import LanceTable
from shoulders.reader.engines.loading import load
from shoulders.reader.index.build import Choices, build
from shoulders.reader.index.index import Index
from shoulders.reader.index.plan import DenseChoice
from shoulders.reader.passage import Collection, Found
from shoulders.reader.questions import Question, read_questions
from shoulders.reader.watch import Silent

ROOT = Path(__file__).parents[1]
HITS = (1, 4, 20)
K = 100


def main() -> None:
    """Build, move, search, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/nq")
    parser.add_argument("--encoder", help="also dense: embedded, a Hub id or a folder")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/engine.json")
    options = parser.parse_args()
    questions = read_questions(options.data / "test.jsonl")
    dense = (
        DenseChoice(question=options.encoder, passage=options.encoder) if options.encoder else None
    )
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "index"), str(Path(folder, "lance"))
        build(options.data / "passages.tsv", ours, Silent(), Choices(dense))
        began = time.perf_counter()
        count = load(ours, theirs, Silent())
        seconds = time.perf_counter() - began
        results = {}
        with Index(ours) as index, LanceTable(theirs) as table:
            for kind in ("sparse", "dense") if dense else ("sparse",):
                texts = [question.question for question in questions]
                found = [p.retriever(kind).search(texts, K) for p in (index, table)]
                results[kind] = {
                    "index": hits(questions, found[0], index),
                    "lancedb": hits(questions, found[1], table),
                    "agreement": {f"at_{k}": agreement(*found, k) for k in (*HITS, K)},
                }
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("lancedb", "tantivy")},
        "passages": count,
        "questions": len(questions),
        "encoder": options.encoder,
        "moving_seconds": seconds,
        "results": results,
    }
    write_json(options.out, facts)
    for kind, result in results.items():
        print(kind, result)


def hits(questions: list[Question], found: Found, passages: Collection) -> dict[str, Any]:
    """Return the share of questions with an answer among the first `k`, in percent."""
    right = [
        [has_answer(p.text, question.answers) for p in passages.passages(ids[: max(HITS)])]
        for question, ids in zip(questions, found.ids, strict=True)
    ]
    shares = {}
    for k in HITS:
        hit = [float(any(row[:k])) for row in right]
        shares[f"answer_hit_at_{k}"] = {
            "value": 100 * float(np.mean(hit)),
            "ci95": bootstrap_interval({"nq": hit}),
        }
    return shares


def agreement(first: Found, second: Found, k: int) -> float:
    """Return how much of what the first found the second found as well."""
    rows = zip(first.ids, second.ids, strict=True)
    return float(np.mean([len({*a[:k]} & {*b[:k]}) / len(a[:k]) for a, b in rows if a]))


if __name__ == "__main__":
    main()
