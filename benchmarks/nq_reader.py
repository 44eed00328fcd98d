"""The frozen reader on Natural Questions: every stage, at several windows, beside the bare LM.

    .venv/bin/python benchmarks/nq_reader.py --runs runs/nq

Trains `recipes/nq_reader.yaml` through the command line (finished runs are kept), then scores on
the test split, at windows of 160, 320 and 1,024 tokens of passages: the bare LM without and with
worked examples in its context (in BM25's order), and the trained reader with and without its
re-ranker. Exact match and F1 are SQuAD's, intervals are bootstraps over questions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from shoulders.cli.common import BASE
from shoulders.cli.readers import ZERO_SHOT, open_reader
from shoulders.evaluation.metrics import exact_match, normalize_squad
from shoulders.evaluation.report_card import report_card
from shoulders.files import write_json
from shoulders.machine import machine
from shoulders.progress import quiet_progress
from shoulders.reader.answers import has_answer
from shoulders.reader.calibration import Reliability, plot_reliability, reliability
from shoulders.reader.questions import Question, read_questions
from shoulders.skills.reader import Answer, Reader

ROOT = Path(__file__).parents[1]
SHOULDERS = Path(sys.executable).parent / "shoulders"
WINDOWS = (160, 320, 1024)
SHOTS = 5  # worked examples, without passages: five with theirs would not fit a small window


def main() -> None:
    """Train what is not there yet, score what is not there yet, and collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/nq")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/nq")
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--bare-windows", type=int, nargs="+", default=[160],
                        help="windows at which the bare LM reads, too")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nq_reader.json")
    options = parser.parse_args()

    index = options.runs / "index"
    if not (index / "manifest.json").is_file():
        _run("index", options.data / "passages.tsv", "--out", index, "--resume")
    readers = {f"reader-seed{seed}": _trained(seed, options.runs) for seed in options.seeds}
    questions = read_questions(options.data / f"{options.split}.jsonl")
    shots = read_questions(options.data / "train.jsonl")[:SHOTS]
    results = []
    for window in options.windows:
        for name in ("zero-shot", "few-shot") if window in options.bare_windows else ():
            results.append(
                _scored(
                    options,
                    name,
                    window,
                    lambda window=window, name=name: _bare(
                        index, window, shots if name == "few-shot" else []
                    ),
                    questions,
                )
            )
        for name, folder in readers.items():
            for rerank in (True, False):
                results.append(
                    _scored(
                        options,
                        name if rerank else f"{name}-bm25-order",
                        window,
                        lambda window=window, folder=folder, rerank=rerank: open_reader(
                            str(folder), str(index), window=window, rerank=rerank
                        ),
                        questions,
                    )
                )
    facts = {name: _facts(folder) for name, folder in readers.items()}
    write_json(
        options.out,
        {
            "benchmark": "nq_reader",
            "split": options.split,
            "results": results,
            "readers": facts,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    drawn = next((r["reliability"] for r in results if r.get("reliability")), None)
    if drawn:
        curves = {name: Reliability.model_validate(curve) for name, curve in drawn.items()}
        plot_reliability(curves, options.out.with_name(f"{options.out.stem}_reliability.png"))
    print(_markdown(results))


def _facts(folder: Path) -> dict[str, Any]:
    """Return how a reader was trained; its data's files by name, wherever they lie here."""
    text = (folder / "reader.json").read_text(encoding="utf-8")

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and value.startswith("/") else value

    facts: dict[str, Any] = named(json.loads(text)["provenance"])
    return facts


def _trained(seed: int, runs: Path) -> Path:
    folder = runs / f"reader-seed{seed}"
    if not (folder / "reader.json").is_file():
        _run("train", ROOT / "recipes/nq_reader.yaml", "--out", folder, "--resume",
             "--set", f"training.seed={seed}")  # fmt: skip
    return folder


def _bare(index: Path, window: int, shots: list[Question]) -> Reader:
    """Return the bare LM as a reader, in the recipe's precision, with worked examples or none."""
    reader = open_reader(BASE, str(index), window=window, dtype="int8")
    worked = "".join(f"Question: {q.question}\nAnswer: {q.answers[0]}\n\n" for q in shots)
    question = ZERO_SHOT.replace("Question: ", worked + "Question: ")
    pack = reader.config.pack.model_copy(update={"question": question})
    return Reader(reader.skill, reader.contexts, reader.config.model_copy(update={"pack": pack}))


def _scored(
    options: argparse.Namespace, name: str, window: int, make: Any, questions: list[Question]
) -> dict[str, Any]:
    """Return the report card of one reader at one window; kept in a file of its own."""
    file = options.runs / "cards" / f"{options.split}-{name}-{window}.json"
    if not file.is_file():
        reader = make()
        with quiet_progress(
            Console(stderr=True), f"{name} at {window}", 2 * len(questions)
        ) as advance:
            card = report_card(reader, questions, on_search=advance, on_read=advance)
        trained = reader.skill.trained_parameters
        values = {"reader": name, "window": window, "trained_parameters": trained}
        curves = believable(questions, card.answers) if reader.config.confidence else {}
        kept = {key: curve.model_dump() for key, curve in curves.items()}
        write_json(file, {**values, **card.as_dict(), "reliability": kept})
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def believable(questions: list[Question], answers: list[Answer]) -> dict[str, Reliability]:
    """Return how far a reader's probabilities hold: its re-ranker's, and its answers'."""
    curves = {}
    found = [(p, s, q) for q, a in zip(questions, answers, strict=True)
             for p, s in zip(a.ranked.passages, a.ranked.scores, strict=True)]  # fmt: skip
    if all(0 <= score <= 1 for _, score, _ in found):
        holds = [has_answer(passage.text, q.answers) for passage, _, q in found]
        curves["a passage holds the answer"] = reliability([s for _, s, _ in found], holds)
    right = [exact_match(a.text, q.answers, normalize_squad) == 1
             for q, a in zip(questions, answers, strict=True)]  # fmt: skip
    curves["the answer is right"] = reliability([a.confidence or 0.0 for a in answers], right)
    return curves


def _markdown(results: list[dict[str, Any]]) -> str:
    lines = ["| reader | window | answer in window | EM, 95% | F1 | EM given it is there |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        m, (low, high) = r["metrics"], r["ci95"]["exact_match"]
        lines.append(
            f"| {r['reader']} | {r['window']} | {m['packed_answer_hit']:.1f} "
            f"| {m['exact_match']:.1f} [{low:.1f}, {high:.1f}] | {m['f1']:.1f} "
            f"| {m.get('exact_match_given_packed', 0):.1f} |"
        )
    return "\n".join(lines)


def _run(*arguments: object) -> None:
    subprocess.run([str(SHOULDERS), *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
