"""Re-rankers on nq: answer-hit@k before and after each of them, and how far they can be believed.

    .venv/bin/shoulders index ../shared/data/nq/passages.tsv --out runs/nq_index
    .venv/bin/python benchmarks/rerank.py --index runs/nq_index

The first `k` passages are re-ranked by a trained cross-encoder, by the frozen LM's likelihood of
the question, and by fusions. What is fitted (cross-encoder, fusions, calibration) is fitted on
training questions; fusions and calibration see only scores of models that had not seen the
question. Finished parts are kept in `--runs`, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from shoulders.cli.common import quiet_libraries
from shoulders.evaluation.metrics import bootstrap_interval
from shoulders.files import write_json
from shoulders.lm.load import load_lm
from shoulders.machine import machine
from shoulders.progress import quiet_progress
from shoulders.reader.answers import has_answer
from shoulders.reader.calibration import Reliability, fit_platt, plot_reliability, reliability
from shoulders.reader.crossfit import cross_fitted
from shoulders.reader.index.index import Index
from shoulders.reader.mining import mine
from shoulders.reader.passage import Found, Passage
from shoulders.reader.questions import Question, read_questions
from shoulders.reader.reranker import Reranker, Scores, found_passages, reordered
from shoulders.reader.rerankers.cross_encoder import (
    FILE,
    CrossEncoderConfig,
    CrossEncoderReranker,
    load_cross_encoder,
    save_cross_encoder,
)
from shoulders.reader.rerankers.fused import fit_fusion, save_fusion
from shoulders.reader.rerankers.likelihood import LikelihoodConfig, LikelihoodReranker
from shoulders.reader.rerankers.training import train_cross_encoder

ROOT = Path(__file__).parents[1]
HITS = (1, 2, 4, 20)
HELD = ("validation", "test")
CONSOLE = Console(stderr=True)


class Split:
    """The questions of a split, what was retrieved for them, and where the answers are."""

    def __init__(self, questions: list[Question], index: Index, retriever: str, k: int) -> None:
        self.questions = questions
        self.texts = [question.question for question in questions]
        self.found = Found(*index.retriever(retriever).search(self.texts, k))
        self.passages: list[list[Passage]] = found_passages(self.found, index)
        self.right = [
            [has_answer(passage.text, question.answers) for passage in own]
            for question, own in zip(questions, self.passages, strict=True)
        ]
        self.pairs = sum(map(len, self.passages))

    def scored(self, reranker: Reranker, name: str, first: int | None = None) -> Scores:
        """Return a re-ranker's scores of the first questions, behind a bar."""
        passages, scores = self.passages[:first], self.found.scores[:first]
        with quiet_progress(CONSOLE, name, sum(map(len, passages))) as advance:
            return reranker.score(self.texts[:first], passages, scores, on_pairs=advance)

    def hits(self, scores: Scores) -> dict[str, dict[str, Any]]:
        """Return the share of questions with an answer among the best, in percent."""
        position = Found([[str(i) for i in range(len(row))] for row in scores], scores)
        ordered = reordered(position, scores).ids
        results = {}
        for k in HITS:
            hit = [
                float(any(own[int(i)] for i in row[:k]))
                for row, own in zip(ordered, self.right, strict=True)
            ]
            results[f"answer_hit_at_{k}"] = {
                "value": 100 * float(np.mean(hit)),
                "ci95": bootstrap_interval({"nq": hit}),
            }
        return results


def main() -> None:
    """Run what is not there yet, then collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/nq")
    parser.add_argument("--index", type=Path, required=True)
    parser.add_argument("--retriever", default="sparse")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/rerank")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rerank.json")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--config", type=json.loads, default={}, help="of the cross-encoder, JSON")
    parser.add_argument("--lm", default="embedded", help="for likelihoods; 'none' leaves them out")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument(
        "--fusion-rows", type=int, default=300, help="training questions of fusions"
    )
    parser.add_argument("--limit", type=int, help="questions of each split, for a trial")
    options = parser.parse_args()
    quiet_libraries()

    index = Index(options.index)
    splits = {
        name: Split(
            read_questions(options.data / f"{name}.jsonl")[: options.limit],
            index,
            options.retriever,
            options.k,
        )
        for name in ("train", *HELD)
    }
    setting = {
        "retriever": options.retriever,
        "index": index.manifest.content,
        "k": options.k,
        "limit": options.limit,
    }
    retrieved = {name: split.found.scores for name, split in splits.items()}
    likelihood, seconds = (
        ({}, {}) if options.lm == "none" else _likelihood(splits, options, setting)
    )
    runs = []
    for seed in options.seeds:
        config = CrossEncoderConfig.model_validate(options.config | {"seed": seed})
        folder = options.runs / _named(setting | {"config": config.model_dump(mode="json")})
        encoder, facts = _cross_encoder(splits, index, config, folder, setting)
        members = {"retriever": retrieved, "cross_encoder": encoder}
        if likelihood:
            members["likelihood"] = likelihood
        evaluated = _evaluated(splits, members, options.fusion_rows, folder, options.out)
        runs.append({"seed": seed, "config": config.model_dump(mode="json")} | facts | evaluated)
    packages = ("shoulders", "torch", "transformers", "sentence-transformers", "scikit-learn")
    write_json(
        options.out,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": {name: version(name) for name in packages},
            "setting": setting | {"lm": options.lm, "dtype": options.dtype,
                                  "fusion_rows": options.fusion_rows},
            "likelihood_seconds": seconds,
            "questions": {name: len(split.questions) for name, split in splits.items()},
            "runs": runs,
        },
    )  # fmt: skip
    print(_markdown(runs))


def _likelihood(
    splits: dict[str, Split], options: argparse.Namespace, setting: dict[str, Any]
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Return UPR's scores of each split (of training only what fusions need)."""
    config = LikelihoodConfig()
    folder = options.runs / _named(
        setting | {"lm": options.lm, "dtype": options.dtype, **config.model_dump()}
    )
    opened = functools.cache(
        lambda: LikelihoodReranker(load_lm(options.lm, dtype=options.dtype), config)
    )
    scores, seconds = {}, {}
    for name, split in splits.items():
        first = options.fusion_rows if name == "train" else len(split.questions)

        def score(split: Split = split, first: int = first, name: str = name) -> Any:
            return split.scored(opened(), f"likelihood, {name}", first)

        scores[name], seconds[name] = _kept(folder / f"{name}-{first}.json", score)
    return scores, seconds


def _cross_encoder(
    splits: dict[str, Split],
    index: Index,
    config: CrossEncoderConfig,
    folder: Path,
    setting: dict[str, Any],
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Return a cross-encoder's scores of each split, those of training questions out of fold."""
    train = splits["train"]
    with quiet_progress(CONSOLE, "mining", len(train.questions)) as advance:
        retriever = index.retriever(setting["retriever"])
        mining = mine(train.questions, retriever, index, config.mining, on_questions=advance)

    def trained(kept: list[int]) -> CrossEncoderReranker:
        examples = mining.among(kept)
        with quiet_progress(CONSOLE, "training", config.epochs * len(examples)) as advance:
            return train_cross_encoder(examples, config, on_questions=advance).reranker

    def whole() -> dict[str, int]:
        if not (folder / "model" / FILE).is_file():
            reranker = trained(list(range(len(train.questions))))
            save_cross_encoder(reranker, folder / "model")
        return {"parameters": load_cross_encoder(folder / "model").parameters}

    facts, seconds = _kept(folder / "trained.json", whole)
    answers = [[q.answers, q.gold_passage_id] for q in train.questions]
    scores: dict[str, Scores] = {}
    scores["train"], folds_seconds = _kept(
        folder / "train.json",
        lambda: cross_fitted(
            trained, train.texts, train.passages, train.found.scores,
            folds=config.folds, seed=config.seed, cache=folder / "folds",
            settings={**config.model_dump(mode="json"), "mined": _named({"answers": answers})},
        ),
    )  # fmt: skip
    speeds = {}
    for name in HELD:
        split = splits[name]

        def score(split: Split = split, name: str = name) -> Any:
            return split.scored(load_cross_encoder(folder / "model"), f"cross-encoder, {name}")

        scores[name], spent = _kept(folder / f"{name}.json", score)
        speeds[name] = split.pairs / spent if spent else None
    facts |= {
        "trained_on": len(mining.among(range(len(train.questions)))),
        "without_positive": mining.without_positive,
        "without_negative": mining.without_negative,
        "false_negatives": mining.false_negatives,
        "training_seconds": seconds,
        "cross_fitting_seconds": folds_seconds,
        "scored_pairs_per_second": speeds,
    }
    return scores, facts


def _evaluated(
    splits: dict[str, Split],
    members: dict[str, dict[str, Scores]],
    fusion_rows: int,
    folder: Path,
    out: Path,
) -> dict[str, Any]:
    """Return the hits of every member and fusion, and how reliable their probabilities are."""
    methods = dict(members)
    probabilities: dict[str, Scores] = {}
    platt = fit_platt(_flat(members["cross_encoder"]["train"]), _flat(splits["train"].right))
    probabilities["cross_encoder"] = [
        [platt.probability(score) for score in row] for row in members["cross_encoder"]["test"]
    ]
    fusions: list[tuple[str, ...]] = [("retriever", "cross_encoder")]
    if "likelihood" in members:
        fusions += [("retriever", "likelihood"), ("retriever", "cross_encoder", "likelihood")]
    for names in fusions:
        fusion = fit_fusion(
            {name: members[name]["train"][:fusion_rows] for name in names},
            splits["train"].right[:fusion_rows],
        )
        title = " + ".join(names)
        save_fusion(fusion, folder / f"{'-'.join(names)}.json")
        methods[title] = {
            held: fusion.probabilities({name: members[name][held] for name in names})
            for held in HELD
        }
        probabilities[title] = methods[title]["test"]
    curves: dict[str, Reliability] = {
        name: reliability(_flat(rows), _flat(splits["test"].right))
        for name, rows in probabilities.items()
    }
    plot_reliability(curves, out.with_name(f"{out.stem}-reliability-{folder.name[:6]}.png"))
    return {
        "methods": {
            name: {held: splits[held].hits(scores[held]) for held in HELD}
            for name, scores in methods.items()
        },
        "calibration": platt.model_dump(),
        "reliability_on_test": {name: curve.model_dump() for name, curve in curves.items()},
    }


def _kept(file: Path, compute: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `compute` does, and the seconds it took, from `file` where that is there."""
    if not file.is_file():
        started = time.perf_counter()
        value = compute()
        write_json(file, {"value": value, "seconds": time.perf_counter() - started})
    values = json.loads(file.read_text(encoding="utf-8"))
    return values["value"], values["seconds"]


def _named(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _flat(rows: list[list[Any]]) -> list[Any]:
    return [value for row in rows for value in row]


def _markdown(runs: list[dict[str, Any]]) -> str:
    """Return a table of the test split."""
    lines = [
        f"| seed | re-ranker | {' | '.join(f'hit@{k}' for k in HITS)} | ECE |",
        "|---|---|" + "---|" * (len(HITS) + 1),
    ]
    for run in runs:
        for name, held in run["methods"].items():
            cells = []
            for k in HITS:
                entry = held["test"][f"answer_hit_at_{k}"]
                low, high = entry["ci95"]
                cells.append(f"{entry['value']:.1f} [{low:.1f}, {high:.1f}]")
            curve = run["reliability_on_test"].get(name)
            ece = f"{100 * curve['ece']:.1f}" if curve else ""
            lines.append(f"| {run['seed']} | {name} | {' | '.join(cells)} | {ece} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
