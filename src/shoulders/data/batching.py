"""Batches of rows of similar length, so that little of a batch is padding.

Evaluation and generation group all rows, greedily. Training splits the few rows of *one*
optimizer step (a window of consecutive mixture examples) into the cheapest micro-batches, whose
gradients are accumulated: the step's sum is the same however its rows are split.
"""

from __future__ import annotations

from collections.abc import Sequence


def length_grouped(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """Split row indices into batches; shortest rows first, equal lengths by index.

    A batch takes rows while rows * longest row <= `max_tokens` (padded tokens) and
    rows <= `max_rows`. A row longer than `max_tokens` is a batch of its own. Every index occurs
    exactly once. Raises `ValueError` for limits below 1 or a negative length.
    """
    if max_tokens < 1 or max_rows < 1:
        raise ValueError(f"max_tokens ({max_tokens}) and max_rows ({max_rows}) must be at least 1")
    if any(length < 0 for length in lengths):
        raise ValueError("a length is negative")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        # Ascending order: the row that joins is always the longest of its batch.
        fits = batches and (len(batches[-1]) + 1) * lengths[index] <= max_tokens
        if fits and len(batches[-1]) < max_rows:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def cheapest_split(lengths: Sequence[int], max_tokens: int, pass_cost: int) -> list[list[int]]:
    """Split the rows of one step into the micro-batches that cost least.

    A batch costs its padded tokens (rows * longest row) plus `pass_cost`, what a forward and
    backward pass costs beside its tokens (reading every weight once), in tokens. Exact, by
    dynamic programming over rows in order of length: some best split never interleaves lengths.
    No batch has more than `max_tokens` padded tokens, but for a single longer row. Raises
    `ValueError` as `length_grouped` does.
    """
    if max_tokens < 1 or pass_cost < 0:
        raise ValueError(f"max_tokens ({max_tokens}) must be at least 1, pass_cost not negative")
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    best: list[tuple[int, int]] = [(0, 0)]  # of the first `end` rows: cost, start of last batch
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        candidates = [
            (best[start][0] + (end - start) * longest + pass_cost, start)
            for start in range(end)
            if end - start == 1 or (end - start) * longest <= max_tokens
        ]
        best.append(min(candidates))
    batches: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        batches.insert(0, order[start:end])
        end = start
    return batches


def padding_share(batches: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
    """Return the share of padding among all tokens of padded `batches`, from 0 to below 1."""
    used = sum(lengths[index] for batch in batches for index in batch)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches if batch)
    return 1 - used / padded if padded else 0.0
