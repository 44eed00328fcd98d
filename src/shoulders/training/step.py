"""The gradients of one optimizer step, computed in packs, side by side where that pays."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoulders.data.batching import balanced, length_grouped
from shoulders.lm.streams import Streams
from shoulders.skills.skill import Skill
from shoulders.training.configs import TrainingConfig
from shoulders.training.objective import Example, answer_losses
from shoulders.training.processes import Processes


def gradients(
    skill: Skill,
    examples: Sequence[Example],
    config: TrainingConfig,
    streams: Streams,
    processes: Processes | None = None,
) -> float:
    """Set the gradient of every trained tensor; return the loss, in nats per answer token.

    Gradients are summed in the order of the packs, whichever was ready first. One of several
    `processes` computes its share of the packs; their sum is its caller's to take.
    Where the LM is sharded, returns when no other process computes any more.
    """
    processes = processes or Processes()
    assert skill.trained is not None
    trained = list(skill.trained.parameters())
    answers = sum(len(e.answer_ids) for e in examples)

    def one(rows: list[int]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        part = [examples[i] for i in rows]
        losses = losses_of(skill, part, recompute=config.recompute)
        loss = losses.sum() / answers
        return loss.detach(), torch.autograd.grad(loss, trained, allow_unused=True)

    packs = split(skill, examples, config.micro_tokens, streams.count * processes.count)
    total: list[Tensor | None] = [None] * len(trained)
    losses = []
    for loss, found in streams.map(one, processes.share(packs)):  # summed as they come
        losses.append(loss)
        total = [b if a is None else a if b is None else a + b
                 for a, b in zip(total, found, strict=True)]  # fmt: skip
    skill.lm.settle()
    for parameter, gradient in zip(trained, total, strict=True):
        parameter.grad = gradient
    return float(sum(losses))


def losses_of(skill: Skill, examples: Sequence[Example], *, recompute: bool = False) -> Tensor:
    """Return the losses of a skill's last passes, see `answer_losses`."""
    texts = [e.text for e in examples]
    prompt = skill.prompt(texts)
    embedded = skill.embedded(texts, [e.read_ids for e in examples], recompute=recompute)
    return answer_losses(skill.lm, prompt, examples, embedded, recompute=recompute)


def split(skill: Skill, examples: Sequence[Example], most: int, multiple: int) -> list[list[int]]:
    """Split a step's rows into packs of at most `most` positions (a longer row is one alone).

    Through fused layers there are no pads, and packs of equal size finish together. Elsewhere
    rows of similar length share a batch. In both cases there are `multiple` or more, so that
    nobody is without work, unless there are fewer rows.
    """
    lengths = [skill.prompt_length + e.tokens for e in examples]
    if skill.lm.blocks is None:
        return length_grouped(lengths, most, -(-len(examples) // multiple))
    return balanced(lengths, most, multiple)
