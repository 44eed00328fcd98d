"""Against the sceptic: the frozen reader beside fine-tuned ones, on the same contexts.

    .venv/bin/python benchmarks/nq_rivals.py --readers runs/nq/reader-seed0 runs/nq/reader-480 \
        --index runs/nq/index --examples 480

Packs the test questions' contexts as the first frozen reader does, has comparisons/reader_rivals.py
train the same LM (LoRA through PEFT; fully fine-tuned) on the contexts that it was trained on, and
scores all answers alike. `--examples` says how many the rivals may see: a second frozen reader
trained on as many (`shoulders train ... --set training.steps=60`) stands beside them. Finished
runs are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shoulders.benchmark.contender import peer_lm
from shoulders.cli.readers import open_reader
from shoulders.data.rows import read_rows
from shoulders.evaluation.metrics import (
    bootstrap_interval,
    exact_match,
    normalize_squad,
    token_f1,
)
from shoulders.files import write_json, write_text
from shoulders.machine import machine
from shoulders.reader.contexts import Ranked
from shoulders.reader.questions import Question, read_questions
from shoulders.skills.reader import Reader, first_line

ROOT = Path(__file__).parents[1]
# Learning rates from PEFT's and transformers' own examples of this size of task.
RATES = {"lora": 5e-4, "full": 1e-4}
ROWS = 8  # in a step
TIMED_STEPS, TIMED_QUESTIONS = 3, 48  # long runs share the machine; these few are run alone


def main() -> None:
    """Run what is not there yet, score everything, and collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data/nq")
    parser.add_argument("--readers", type=Path, nargs="+", required=True)
    parser.add_argument("--index", required=True)
    parser.add_argument("--split", default="test", choices=("validation", "test"))
    parser.add_argument("--variants", nargs="+", default=["lora", "full"], choices=sorted(RATES))
    parser.add_argument("--examples", type=int, help="default: as many as the reader's")
    parser.add_argument("--untimed", action="store_true",
                        help="measure no speed: something else runs beside")  # fmt: skip
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/nq/rivals")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nq_rivals.json")
    options = parser.parse_args()

    questions = read_questions(options.data / f"{options.split}.jsonl")
    answers = [q.answers for q in questions]
    reader = open_reader(str(options.readers[0]), options.index)
    ranked = reader.contexts.ranked(questions)
    packed = [p.text for p in reader.packed(questions, ranked)]
    results = [
        frozen(folder, open_reader(str(folder), options.index), questions, ranked)
        for folder in options.readers
    ]
    examples = options.examples or results[0]["examples"]
    rate = None if options.untimed else answers_per_second(reader, questions, ranked)
    for result in results:
        result["answers_per_second"] = rate
    test = options.runs / f"{options.split}.jsonl"
    write_rows(test, reader, packed, answers)
    few = options.runs / "timed.jsonl"
    write_rows(few, reader, packed[:TIMED_QUESTIONS], answers[:TIMED_QUESTIONS])
    rows = read_rows(options.readers[0] / "contexts" / "train.jsonl")
    train = options.runs / "train.jsonl"
    write_rows(train, reader, [r.input for r in rows], [r.targets for r in rows])
    del reader
    for variant in options.variants:
        file = options.runs / f"{options.split}-{variant}-{examples}.json"
        if not file.is_file():
            run_rival(variant, examples, train, test, file)
        found = json.loads(file.read_text(encoding="utf-8"))
        timed = options.runs / f"timed-{variant}.json"
        times: dict[str, Any] = {}
        if not options.untimed:
            if not timed.is_file():
                run_rival(variant, TIMED_STEPS * ROWS, train, few, timed)
            times = json.loads(timed.read_text(encoding="utf-8"))
        results.append(
            {
                "reader": variant if found["rank"] is None else f"LoRA r{found['rank']}",
                "precision": "float32",
                **{k: found[k] for k in ("trained_parameters", "examples", "lr")},
                "seconds_a_step": times["training_seconds"] / TIMED_STEPS if times else None,
                "answers_per_second": TIMED_QUESTIONS / times["answer_seconds"] if times else None,
                **scored([first_line(a) for a in found["answers"]], answers),
            }
        )
    write_json(
        options.out,
        {
            "benchmark": "nq_rivals",
            "split": options.split,
            "n": len(questions),
            "results": results,
            "machine": machine(),
            "seed": 0,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    print("| reader | trained | examples | s a step of 8 | answers/s | EM, 95% | F1 |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        low, high = r["ci95"]
        print(
            f"| {r['reader']} | {r['trained_parameters']:,} | {r['examples']:,} "
            f"| {r['seconds_a_step'] or 0:.1f} | {r['answers_per_second'] or 0:.1f} "
            f"| {r['exact_match']:.1f} [{low:.1f}, {high:.1f}] | {r['f1']:.1f} |"
        )


def answers_per_second(reader: Reader, questions: list[Question], ranked: list[Ranked]) -> float:
    """Return how fast a frozen reader answers questions whose passages are found."""
    started = time.perf_counter()
    reader.answer(questions[:TIMED_QUESTIONS], ranked[:TIMED_QUESTIONS])
    return TIMED_QUESTIONS / (time.perf_counter() - started)


def frozen(
    folder: Path, reader: Reader, questions: list[Question], ranked: list[Ranked]
) -> dict[str, Any]:
    """Return one frozen reader's scores, and what it took."""
    facts = json.loads((folder / "skill.json").read_text(encoding="utf-8"))["provenance"]
    training = facts["recipe"]["training"]
    said = [a.text for a in reader.answer(questions, ranked)]
    return {
        "reader": "frozen",
        "trained_parameters": reader.skill.trained_parameters,
        "examples": training["steps"] * training["rows_per_step"],
        "lr": training["optimizer"]["lr"],
        "seconds_a_step": facts["training_seconds"] / training["steps"],
        "precision": reader.skill.lm.precision,
        **scored(said, [q.answers for q in questions]),
    }


def run_rival(variant: str, examples: int, train: Path, test: Path, file: Path) -> None:
    """Train and ask one rival in a process of its own."""
    command = [sys.executable, str(ROOT / "comparisons/reader_rivals.py"),
               "--lm", peer_lm("embedded"), "--train", train, "--test", test,
               "--variant", variant, "--examples", examples, "--lr", RATES[variant],
               "--out", file]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True)


def write_rows(path: Path, reader: Reader, texts: list[str], answers: Any) -> None:
    """Write tokens as the frozen reader sees them, its separator and end token included."""
    skill = reader.skill
    lines = []
    for text, own in zip(texts, answers, strict=True):
        (ids,) = skill.input_ids([text], reader.config.max_new_tokens)
        lines.append(json.dumps({"ids": ids, "answer_ids": skill.answer_ids(list(own))}))
    write_text(path, "\n".join(lines) + "\n")


def scored(said: list[str], answers: Any) -> dict[str, Any]:
    """Return exact match and F1 in percent, with a bootstrap interval of the first."""
    both = list(zip(said, answers, strict=True))
    exact = [float(exact_match(text, right, normalize_squad)) for text, right in both]
    f1 = [token_f1(text, right) for text, right in both]
    return {
        "exact_match": 100 * sum(exact) / len(exact),
        "f1": 100 * sum(f1) / len(f1),
        "ci95": list(bootstrap_interval({"all": exact})),
    }


if __name__ == "__main__":
    main()
