"""Several pieces of work side by side, each on its share of the processor's threads.

Two pieces on one core each are faster than one after the other on two: threads then wait for
each other once in a while, and not at every product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

import torch

from shoulders.lm.frozen import FrozenLM

MOST = 4
T = TypeVar("T")
R = TypeVar("R")


def streams_for(lm: FrozenLM) -> int:
    """Return how many streams pay: as many as threads, four at most, for fused layers."""
    return min(torch.get_num_threads(), MOST) if lm.blocks is not None else 1


class Streams:
    """A pool of `count` threads; with one, work is done where it is asked for.

    Examples:
        >>> with Streams(2) as streams:
        ...     list(streams.map(lambda x: x + 1, [1, 2, 3]))
        [2, 3, 4]
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    @classmethod
    def of(cls, lm: FrozenLM, wanted: int | None = None) -> Streams:
        """Open `wanted` streams; None: as many as pay, see `streams_for`."""
        return cls(wanted or streams_for(lm))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield `function(item)` for every item, in order."""
        if self._pool is None:
            yield from map(function, items)
            return

        def on_its_share(item: T) -> R:
            torch.set_num_threads(max(1, self._threads // self.count))
            return function(item)

        try:
            yield from self._pool.map(on_its_share, items)
        finally:
            torch.set_num_threads(self._threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)
