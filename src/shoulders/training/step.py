"""The gradients of one optimizer step, computed in packs, side by side where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from shoulders.data.batching import balanced, length_grouped
from shoulders.skills.skill import Skill
from shoulders.training.objective import Example, answer_losses
from shoulders.training.recipe import TrainingConfig


class Streams:
    """Computes the packs of a step: several at a time, each on its share of the processor.

    Two packs on one core each are faster than one after the other on two, since threads then
    wait for each other once a step and not at every product. Sums are taken in the order of
    the packs, so that a result does not depend on which pack was ready first.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def gradients(self, skill: Skill, examples: Sequence[Example], config: TrainingConfig) -> float:
        """Set the gradient of every trained tensor; return the loss, nats per answer token."""
        producer = skill.producer
        assert producer is not None
        trained = list(producer.parameters())
        answers = sum(len(e.answer_ids) for e in examples)

        def one(rows: list[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            if self._pool is not None:
                torch.set_num_threads(max(1, self._threads // self.count))
            part = [examples[i] for i in rows]
            prompt = skill.prompt([e.text for e in part])
            loss = answer_losses(skill.lm, prompt, part, recompute=config.recompute).sum() / answers
            return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)

        packs = split(skill, examples, config.micro_tokens, self.count)
        if self._pool is None:
            parts = [one(rows) for rows in packs]
        else:
            parts = list(self._pool.map(one, packs))
            torch.set_num_threads(self._threads)
        for parameter, *several in zip(trained, *(grads for _, grads in parts), strict=True):
            found = [g for g in several if g is not None]
            parameter.grad = sum(found[1:], found[0]) if found else None
        return float(sum(loss for loss, _ in parts))

    def close(self) -> None:
        """Let the threads go."""
        if self._pool is not None:
            self._pool.shutdown()
        torch.set_num_threads(self._threads)


@contextmanager
def streams(skill: Skill, wanted: int | None) -> Iterator[Streams]:
    """Open `wanted` streams; None: as many as threads, four at most, for fused layers."""
    fused = skill.lm.blocks is not None
    opened = Streams(wanted or (min(torch.get_num_threads(), 4) if fused else 1))
    try:
        yield opened
    finally:
        opened.close()


def split(skill: Skill, examples: Sequence[Example], most: int, multiple: int) -> list[list[int]]:
    """Split a step's rows into packs of at most `most` positions (a longer row is one alone).

    Through fused layers there are no pads, and packs of equal size finish together. Elsewhere
    rows of similar length share a batch.
    """
    prompt = skill.producer.length if skill.producer else 0
    lengths = [prompt + e.tokens for e in examples]
    if skill.lm.blocks is None:
        return length_grouped(lengths, most, len(examples))
    return balanced(lengths, most, multiple)
