"""Batches of rows of similar length, so that little of a batch is padding.

Evaluation and generation group all rows. Training groups the rows of *one* optimizer step (a window
of consecutive mixture examples) into micro-batches, whose gradients are accumulated: the step's
sum is the same however its rows are split.
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


def evenly_grouped(
    lengths: Sequence[int], max_tokens: int, max_rows: int, multiple: int, each: int
) -> list[list[int]]:
    """Split row indices as `length_grouped` does, into batches that take about as long.

    Their number is a `multiple`, so that as many streams end together; a row costs its length and
    `each` more, for what is generated. A batch may be half as large again as `max_tokens`.
    """
    count = len(length_grouped(lengths, max_tokens, max_rows))
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    total = sum(lengths) + each * len(lengths)
    while True:
        count = min(len(lengths), -(-count // multiple) * multiple)
        batches: list[list[int]] = [[] for _ in range(count)]
        before = 0
        for index in order:
            cost = lengths[index] + each
            # The batch in whose share the row's middle lies.
            share = (2 * before + cost) * count // (2 * max(1, total))
            batches[min(count - 1, share)].append(index)
            before += cost
        batches = [batch for batch in batches if batch]
        most = max((len(batch) * lengths[batch[-1]] for batch in batches), default=0)
        widest = max(map(len, batches), default=0)
        if count == len(lengths) or (most <= 1.5 * max_tokens and widest <= max_rows):
            return batches
        count += 1


def balanced(lengths: Sequence[int], most: int, multiple: int = 1) -> list[list[int]]:
    """Split row indices into packs of nearly equal total length.

    As few packs as keep each at about `most` or below, rounded up to a `multiple`, but never more
    than rows. Longest rows are placed first, each into the emptiest pack; deterministic.
    """
    if most < 1 or multiple < 1:
        raise ValueError(f"most ({most}) and multiple ({multiple}) must be at least 1")
    count = -(-sum(lengths) // most)
    count = min(len(lengths), -(-count // multiple) * multiple)
    packs: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        emptiest = min(range(count), key=lambda k: (filled[k], k))
        packs[emptiest].append(index)
        filled[emptiest] += lengths[index]
    return [sorted(pack) for pack in packs]
