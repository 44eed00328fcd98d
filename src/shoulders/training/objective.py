"""The loss: negative log-likelihood of answer tokens, and of nothing else (promise 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a teacher expects at a row's `n` answer positions.

    Attributes:
        ids: `[n, k]`, the tokens that it holds likeliest.
        probabilities: `[n, k]`, what it gives them; each position's sum is 1.
        weight: in (0, 1], how much it counts; the answer itself counts for the rest.
    """

    ids: Tensor
    probabilities: Tensor
    weight: float


@dataclass(frozen=True, slots=True)
class Example:
    """One row ready to train on.

    Attributes:
        text: the input text, all that a producer may see.
        input_ids: tokens of the input with its separator.
        answer_ids: tokens of the answer with the end token; only these are counted.
        task: for averages by task.
        lesson: what a teacher expects at the answer tokens, where one teaches.
    """

    text: str
    input_ids: list[int]
    answer_ids: list[int]
    task: str
    lesson: Lesson | None = None

    @property
    def read_ids(self) -> list[int]:
        """The tokens that the LM reads."""
        return self.input_ids + self.answer_ids[:-1]

    @property
    def tokens(self) -> int:
        """Tokens that the LM reads: the last answer token is only predicted."""
        return len(self.input_ids) + len(self.answer_ids) - 1


def answer_losses(
    lm: FrozenLM,
    prompt: Prompt,
    examples: Sequence[Example],
    embedded: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return each answer token's negative log-likelihood in nats, `[n]`, row after row.

    Logits are computed at the `n` answer positions only, as a 2-D product. Where examples have a
    lesson, of weight `a`, the loss is the cross-entropy with a mixture: `a` parts of the teacher's
    distribution `p` and `1 - a` of the answer (Hinton et al., arXiv 1503.02531, temperature 1).
    All of one call have one, or none.

    Args:
        lm: the frozen LM.
        prompt: one per example.
        examples: rows of tokens.
        embedded: `[t, d]`, what stands for the tokens that are read (`Example.read_ids`), rows
            end to end; by default the LM's own embeddings of them.
        recompute: save memory, see `shoulders.lm.fused.Blocks.hidden`.
    """
    chosen = answer_states(lm, prompt, examples, embedded, recompute=recompute)
    targets = torch.tensor([i for e in examples for i in e.answer_ids], device=lm.device)
    losses = lm.losses(chosen, targets)
    lessons = [e.lesson for e in examples if e.lesson is not None]
    return losses + _lesson_terms(lm, chosen, targets, lessons) if lessons else losses


def answer_states(
    lm: FrozenLM,
    prompt: Prompt,
    examples: Sequence[Example],
    embedded: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Return the states `[n, d]` that predict each answer token; arguments as `answer_losses`."""
    if embedded is None:
        embedded = lm.embed_rows([e.read_ids for e in examples])
    read = states(lm, prompt, embedded, [e.tokens for e in examples], recompute=recompute)
    places: list[int] = []
    for start, example in zip(read.starts, examples, strict=True):
        # The hidden state at the input's last token predicts the answer's first.
        first = start + len(example.input_ids) - 1
        places += range(first, first + len(example.answer_ids))
    return read.values[torch.tensor(places, device=lm.device)]


def _lesson_terms(
    lm: FrozenLM, chosen: Tensor, targets: Tensor, lessons: Sequence[Lesson]
) -> Tensor:
    """Return what lessons add to the losses `[n]` of the answers alone.

    With logits `z` a cross-entropy with `p` is `log sum exp z - sum p z`, and with the answer
    `log sum exp z - z_answer`: they differ by a few logits, and the sum over the vocabulary, which
    `FrozenLM.losses` takes without keeping it, is common to both.
    """
    ids = torch.cat([lesson.ids for lesson in lessons]).to(lm.device)
    wanted = torch.cat([lesson.weight * lesson.probabilities for lesson in lessons]).to(lm.device)
    logits = lm.logits_at(chosen, torch.cat([targets[:, None], ids], dim=1))
    return wanted.sum(1) * logits[:, 0] - (wanted * logits[:, 1:]).sum(1)
