"""What a cross-encoder is trained to minimise, on lists of passages of one question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shoulders.errors import TrainingError
from shoulders.reader.reranker import length_sorted

LossKind = Literal["listwise", "binary"]
CHUNK = 16  # pairs in one forward pass, of similar length: little of it is padding


class ListLoss(nn.Module):
    """The loss of some questions, each with a list of passages and their labels (1 or 0).

    What sentence-transformers' trainer calls: `forward([questions, passages], labels)`, with
    `passages` a list of texts and `labels` a tensor for each question.

    Args:
        model: a `CrossEncoder` with one output.
        kind: `listwise` or `binary`; see `loss_of_list`.
        on_questions: called with the number of questions after each forward pass.
    """

    def __init__(
        self, model: Any, kind: LossKind, on_questions: Callable[[int], None] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.on_questions = on_questions
        self.values: list[float] = []

    def forward(
        self,
        inputs: Sequence[Any],
        labels: Sequence[Tensor],
        prompt: str | None = None,
        task: str | None = None,
    ) -> Tensor:
        """Return the mean over questions; raises `TrainingError` if it is not finite."""
        del prompt, task  # the trainer's, not used by cross-encoders of this kind
        questions, passages = inputs
        pairs = [(q, text) for q, own in zip(questions, passages, strict=True) for text in own]
        logits = self._logits(pairs)
        rows = logits.split([len(own) for own in passages])
        losses = [
            loss_of_list(row, label.to(row.device), self.kind)
            for row, label in zip(rows, labels, strict=True)
        ]
        loss = torch.stack(losses).mean()
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the re-ranker's loss is {value} after {len(self.values)} passes: training "
                "diverged; use a lower learning rate"
            )
        self.values.append(value)
        if self.on_questions is not None:
            self.on_questions(len(questions))
        return loss

    def get_config_dict(self) -> dict[str, str]:
        """Return what the library writes into its model card."""
        return {"kind": self.kind}

    def _logits(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Return the logits `[n]` of pairs, in their order."""
        lengths = [len(question) + len(text) for question, text in pairs]
        batches = length_sorted(lengths, max(lengths) * CHUNK, CHUNK)
        parts = []
        for batch in batches:
            features = self.model.preprocess([pairs[i] for i in batch])
            features = {
                name: value.to(self.model.device) if isinstance(value, Tensor) else value
                for name, value in features.items()
            }
            parts.append(self.model(features)["scores"].view(-1).float())
        order = torch.tensor([i for batch in batches for i in batch])
        return torch.cat(parts)[torch.argsort(order).to(parts[0].device)]


def loss_of_list(logits: Tensor, labels: Tensor, kind: LossKind) -> Tensor:
    """Return the loss of one question's passages.

    `listwise`: the negative log-likelihood of each positive among itself and the negatives, mean
    over positives (localised contrastive estimation: Gao et al. 2021, arXiv 2101.08751).
    `binary`: each passage by itself, mean of the positives' and the negatives' cross-entropy, so
    that as much depends on the few positives as on the many negatives.

    Args:
        logits: `[n]`.
        labels: `[n]`, 1 for positives and 0 for negatives; at least one of each.
        kind: which loss.
    """
    positive = labels > 0
    if kind == "listwise":
        rest = torch.logsumexp(logits[~positive], 0)
        return (torch.logaddexp(logits[positive], rest) - logits[positive]).mean()
    found = nn.functional.softplus(-logits[positive]).mean()
    missed = nn.functional.softplus(logits[~positive]).mean()
    return (found + missed) / 2
