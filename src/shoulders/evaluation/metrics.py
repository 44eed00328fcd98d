"""Exact match, token F1, and averages over tasks with a bootstrap interval."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from shoulders.errors import DataError

LEAST = 6  # rows: of fewer, all right is what a fair coin does once in 32 draws or more often
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Normalise an answer for exact match, changing as little as possible.

    Caseless in Unicode's sense (casefold, composed to NFC), white space squeezed, and one full
    stop at the end dropped. Accents, other punctuation, articles, hyphens and ellipses stay;
    a text that is only a full stop stays too.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    squeezed = " ".join(folded.split())
    if squeezed.endswith("."):
        shortened = squeezed[:-1].rstrip()
        if shortened and not shortened.endswith("."):
            return shortened
    return squeezed


def normalize_squad(text: str) -> str:
    """Normalise as SQuAD's official evaluation script does, in its order.

    Lower case; ASCII punctuation removed (so `state-of-the-art` becomes `stateoftheart`);
    the words a, an, the replaced by a space; white space squeezed.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(
    prediction: str, targets: Sequence[str], normalizer: Callable[[str], str] = normalize
) -> float:
    """Return 1.0 if the prediction equals any target after `normalizer`, else 0.0.

    Raises `ValueError` without targets.
    """
    _check_targets(targets)
    normal = normalizer(prediction)
    return float(any(normal == normalizer(target) for target in targets))


def token_f1(prediction: str, targets: Sequence[str]) -> float:
    """Return SQuAD's token F1 against the best of `targets`, from 0 to 1.

    As in the official script of SQuAD 2.0: where prediction or target has no tokens left after
    `normalize_squad`, the score is 1 if neither has, else 0. (Version 1.1 differs only in
    giving 0 when both are empty.) Raises `ValueError` without targets.
    """
    _check_targets(targets)
    return max(_token_f1(prediction, target) for target in targets)


def _token_f1(prediction: str, target: str) -> float:
    predicted, expected = normalize_squad(prediction).split(), normalize_squad(target).split()
    if not predicted or not expected:
        return float(predicted == expected)
    same = (Counter(predicted) & Counter(expected)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(predicted), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def _check_targets(targets: Sequence[str]) -> None:
    # A plain text is a sequence of texts too: it would be compared letter by letter.
    if isinstance(targets, str) or not targets:
        raise ValueError("targets must be a non-empty sequence of texts")


def macro_average(scores_by_task: Mapping[str, Sequence[float]]) -> float:
    """Return the mean over tasks of the mean over rows, from 0 to 100.

    Scores are from 0 to 1. Raises `DataError` for no tasks or a task without scores, and
    `ValueError` for a score outside 0 to 1.
    """
    return 100 * float(np.mean([scores.mean() for scores in _arrays(scores_by_task)]))


def bootstrap_interval(
    scores_by_task: Mapping[str, Sequence[float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return a confidence interval (low, high) of `macro_average`, from 0 to 100.

    The percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"),
    stratified, see `_resampled`. It covers the choice of test rows, but neither the choice of tasks
    nor the seed of training; and a task of `LEAST` rows or more that all score alike adds no width.
    Deterministic in `seed`, whatever the order of the tasks. Raises as
    `macro_average`, and `ValueError` for other bad arguments.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples ({resamples}) must be above 0 and level ({level}) in (0, 1)")
    low, high = _resampled(_arrays(scores_by_task), resamples, seed, level)
    return max(0.0, low), min(100.0, high)


def paired_interval(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Return how much better `first` is on the same rows, in points: (difference, low, high).

    The paired percentile bootstrap (Efron and Tibshirani 1993, chapter 16): rows are resampled
    within each task, for both alike, so that what is hard for both cancels out. Scores are from 0
    to 1. Raises as `macro_average`, and `ValueError` where tasks or numbers of rows differ.
    """
    ours, theirs = _arrays(first), _arrays(second)
    if sorted(first) != sorted(second) or [len(a) for a in ours] != [len(b) for b in theirs]:
        raise ValueError("both must have scores of the same rows of the same tasks")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    low, high = _resampled(differences, resamples, seed, level)
    difference = macro_average(first) - macro_average(second)
    return difference, max(-100.0, low), min(100.0, high)


def _resampled(
    tasks: Sequence[NDArray[np.float64]], resamples: int, seed: int, level: float
) -> tuple[float, float]:
    """Return the interval of the mean over tasks of the means over their rows, times 100.

    Rows are drawn within each task. Among the rows of a task their mean varies too little by
    `(n - 1) / n`, which is made up for (Davison and Hinkley 1997, on several samples). Fewer than
    `LEAST` rows show too little variation of their own, often none: they are drawn from the rows of
    all tasks that have so few; where only one has, from the rows of all. Fewer than `LEAST` rows in
    all that agree say nothing: no bounds.
    """
    every = np.concatenate(list(tasks))
    if len(every) < LEAST and (every == every[0]).all():
        return -100.0, 100.0
    random = np.random.default_rng(seed)
    few = [scores for scores in tasks if len(scores) < LEAST]
    # (drawn from, rows drawn for a task, tasks)
    strata = [(scores, len(scores), 1) for scores in tasks if len(scores) >= LEAST]
    pooled = np.concatenate(few) if len(few) > 1 else every
    strata += [(pooled, n, count) for n, count in Counter(map(len, few)).items()]
    total = np.full(resamples, float(sum(scores.mean() for scores in tasks)))
    for scores, n, count in strata:
        # How often each distinct score occurs among n rows drawn with replacement is
        # multinomial: the same as drawing rows, without a [resamples, rows] matrix.
        values, counts = np.unique(scores, return_counts=True)
        own = len(scores)
        drawn = random.multinomial(n * count, counts / own, size=resamples)
        wider = math.sqrt(own / (own - 1)) if own > 1 else 1.0
        total += wider * (drawn @ values / n - count * scores.mean())
    tail = (1 - level) / 2
    low, high = np.quantile(100 * total / len(tasks), [tail, 1 - tail])
    return float(low), float(high)


def _arrays(scores_by_task: Mapping[str, Sequence[float]]) -> list[NDArray[np.float64]]:
    """Return each task's scores, tasks in the order of their names, after checking them."""
    if not scores_by_task:
        raise DataError("no tasks to average; evaluate at least one")
    arrays = []
    for task in sorted(scores_by_task):
        scores = np.asarray(scores_by_task[task], dtype=np.float64)
        if scores.size == 0:
            raise DataError(f"task '{task}' has no scored rows; leave it out or add rows")
        if not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(f"task '{task}': scores must be from 0 to 1")
        arrays.append(scores)
    return arrays
