"""Cross-fitting: every question is scored by a model that was trained without it.

What a re-ranker says about questions that it was trained on is too good: a reader trained on
contexts ordered so would meet worse ones at inference, and probabilities fitted to such scores
would be too sure. Scores out of fold are like those of new questions.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoulders.errors import TrainingError
from shoulders.files import remove_partial, write_json
from shoulders.reader.passage import Passage
from shoulders.reader.reranker import OnPairs, Reranker, Scores, check_shapes

Train = Callable[[list[int]], Reranker]
"""Trains a re-ranker on the questions with these indices, and on no others."""


def folds_of(questions: Sequence[str], folds: int, seed: int) -> list[list[int]]:
    """Split the indices of questions into `folds` parts of nearly equal size.

    Questions that differ only in case or white space go into one part: a model that was trained on
    one of them has seen the other. Deterministic; raises `TrainingError` for more folds than
    distinct questions, or fewer than two.
    """
    same: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        same.setdefault(_plain(question), []).append(i)
    if not 2 <= folds <= len(same):
        raise TrainingError(
            f"{len(same)} distinct questions cannot be split into {folds} folds: use 2 or more, "
            "and no more than questions"
        )
    groups = list(same.values())
    random.Random(seed).shuffle(groups)
    parts: list[list[int]] = [[] for _ in range(folds)]
    for group in groups:
        min(parts, key=len).extend(group)
    return [sorted(part) for part in parts]


def cross_fitted(
    train: Train,
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    retrieved: Sequence[Sequence[float]],
    *,
    folds: int,
    seed: int,
    cache: Path,
    settings: Mapping[str, Any],
    on_pairs: OnPairs | None = None,
) -> Scores:
    """Return each question's scores from a model that was trained on the other folds.

    A finished fold is a file in `cache`, named by everything that decides its scores; run again
    after a kill, finished folds are read instead of computed.

    Args:
        train: trains on the questions with given indices; called once for each fold.
        questions: `q` questions.
        passages: each question's passages.
        retrieved: their retriever's scores.
        folds: how many models are trained.
        seed: of the split.
        cache: a folder of its own.
        settings: what else decides the scores, as JSON: the re-ranker's configuration, and a hash
            of what it is trained on where that is more than questions and passages.
        on_pairs: called with the number of pairs scored (or read).

    Raises:
        TrainingError: see `folds_of`.
        ShouldersError: the cache cannot be written.
    """
    check_shapes(questions, passages, retrieved)
    key = _key(questions, passages, retrieved, folds, seed, settings)
    scores: Scores = [[] for _ in questions]
    if cache.is_dir():
        remove_partial(cache)
    for number, held in enumerate(folds_of(questions, folds, seed)):
        file = cache / f"fold-{number + 1}-of-{folds}-{key[:16]}.json"
        done = _read(file, [len(passages[i]) for i in held])
        if done is None:
            kept = sorted(set(range(len(questions))) - set(held))
            reranker = train(kept)
            done = reranker.score(
                [questions[i] for i in held],
                [passages[i] for i in held],
                [retrieved[i] for i in held],
                on_pairs=on_pairs,
            )
            write_json(file, {"key": key, "questions": held, "scores": done})
        elif on_pairs is not None:
            on_pairs(sum(len(row) for row in done))
        for i, own in zip(held, done, strict=True):
            scores[i] = own
    return scores


def _plain(question: str) -> str:
    return " ".join(question.casefold().split())


def _key(
    questions: Sequence[str],
    passages: Sequence[Sequence[Passage]],
    retrieved: Sequence[Sequence[float]],
    folds: int,
    seed: int,
    settings: Mapping[str, Any],
) -> str:
    """Return the hash of everything that decides the scores."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False)
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")

    add({"settings": dict(settings), "folds": folds, "seed": seed})
    for question, own, scores in zip(questions, passages, retrieved, strict=True):
        add([question, [[p.id, p.title, p.text] for p in own], list(scores)])
    return digest.hexdigest()


def _read(file: Path, lengths: Sequence[int]) -> Scores | None:
    """Return a finished fold's scores, or None if there are none to use."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        scores: Scores = [[float(score) for score in row] for row in values["scores"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent, or spoilt from outside: compute it again
    return scores if [len(row) for row in scores] == list(lengths) else None
