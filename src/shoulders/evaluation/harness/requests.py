"""What the harness wants beside answers: its order, its cache filled, its progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from shoulders.lm.score import Score


def in_order(
    arguments: Sequence[tuple[str, str] | None],
    rows: Sequence[Sequence[int]],
    scores: Sequence[Sequence[Score]],
    cache: Any,
) -> list[tuple[float, bool]]:
    """Return scores by request, and give them to the harness's cache.

    Args:
        arguments: context and continuation of each request; None: not to be cached.
        rows: of each context that was read, the numbers of its requests.
        scores: of each context, those of its continuations.
        cache: the harness's `cache_hook`.
    """
    found: dict[int, tuple[float, bool]] = {}
    for own, several in zip(rows, scores, strict=True):
        for number, one in zip(own, several, strict=True):
            found[number] = (one.logprob, one.greedy)
    for number, strings in enumerate(arguments):
        if strings is not None:
            cache.add_partial("loglikelihood", strings, found[number])
    return [found[i] for i in range(len(arguments))]


@contextlib.contextmanager
def bar(what: str, total: int, disabled: bool) -> Iterator[Callable[[int], Any]]:
    """Show a progress bar as the harness draws them; yield what moves it on."""
    with tqdm(total=total, desc=f"shoulders: {what}", disable=disabled) as shown:
        yield shown.update
