"""What a producer writes and the combiner reads: a batch of prompts, one per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoulders.lm.factors import Factors
from shoulders.lm.updates import Matrices, Updates


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompts for `b` rows: vectors at the input, per-layer keys/values, updates, or none of them.

    Attributes:
        vectors: `[b, p, d]`, in the space of the LM's token embeddings.
        vector_mask: `[b, p]` bool, True where a row really has that vector.
        keys_values: `[b, layers, 2, kv_heads, q, head_dim]`, a prefix for every layer's
            attention (2 = keys, values); keys already carry their rotary position.
        keys_values_mask: `[b, q]` bool, True where a row really has that prefix position.
        shared: every row's prompt is the same, with no padding, so that it need be computed
            only once.
        updates: of the states between the LM's layers, where there are any.

    `p` and `q` may be 0, so that a batch can mix rows of any form.
    """

    vectors: Tensor
    vector_mask: Tensor
    keys_values: Tensor
    keys_values_mask: Tensor
    shared: bool = False
    updates: Updates | None = None

    def __post_init__(self) -> None:
        b = self.vectors.shape[0]
        if self.vectors.dim() != 3 or self.vector_mask.shape != self.vectors.shape[:2]:
            raise ValueError(
                f"vectors {tuple(self.vectors.shape)} need [b, p, d] and a [b, p] mask"
            )
        if self.keys_values.dim() != 6 or self.keys_values.shape[2] != 2:
            raise ValueError(
                f"keys_values {tuple(self.keys_values.shape)}: "
                "need [b, layers, 2, kv_heads, q, head_dim]"
            )
        if self.keys_values_mask.shape != (b, self.keys_values.shape[4]):
            raise ValueError("keys_values_mask must be [b, q]")
        if self.updates is not None and len(self.updates.of) != b:
            raise ValueError(f"updates of {len(self.updates.of)} rows for {b} prompts")

    @classmethod
    def of_vectors(cls, vectors: Tensor) -> Prompt:
        """Make a prompt of input vectors `[b, p, d]`, every position real."""
        b, p, _ = vectors.shape
        return cls(
            vectors=vectors,
            vector_mask=torch.ones(b, p, dtype=torch.bool, device=vectors.device),
            keys_values=vectors.new_zeros(b, 0, 2, 0, 0, 0),
            keys_values_mask=torch.ones(b, 0, dtype=torch.bool, device=vectors.device),
        )

    @classmethod
    def of_keys_values(cls, keys_values: Tensor) -> Prompt:
        """Make a prefix of keys/values `[b, layers, 2, kv_heads, q, head_dim]`, all real."""
        b, q = keys_values.shape[0], keys_values.shape[4]
        return cls(
            vectors=keys_values.new_zeros(b, 0, 0),
            vector_mask=torch.ones(b, 0, dtype=torch.bool, device=keys_values.device),
            keys_values=keys_values,
            keys_values_mask=torch.ones(b, q, dtype=torch.bool, device=keys_values.device),
        )

    def repeated(self, rows: int) -> Prompt:
        """Return this prompt of one row for `rows` rows, without copying it."""
        if self.rows != 1:
            raise ValueError(f"only a prompt of one row can be repeated, this has {self.rows}")
        return Prompt(
            vectors=self.vectors.expand(rows, -1, -1),
            vector_mask=self.vector_mask.expand(rows, -1),
            keys_values=self.keys_values.expand(rows, -1, -1, -1, -1, -1),
            keys_values_mask=self.keys_values_mask.expand(rows, -1),
            shared=True,
            updates=self.updates.select([0] * rows) if self.updates else None,
        )

    def updated(self, matrices: Matrices | Factors) -> Prompt:
        """Return these prompts with low-rank updates, between the LM's layers or inside them."""
        return replace(self, updates=Updates.alike(matrices, self.rows))

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> Prompt:
        """Make the prompt of the bare LM: nothing, for `rows` rows."""
        return cls.of_vectors(torch.zeros(rows, 0, 0, device=device))

    @classmethod
    def stack(cls, prompts: Sequence[Prompt]) -> Prompt:
        """Join prompts of any forms and lengths along the rows: `b = sum of their b`.

        Shorter ones are padded on the left, and the padding is masked.
        """
        return cls(
            vectors=_stack_left_padded([p.vectors for p in prompts], dim=1),
            vector_mask=_stack_left_padded([p.vector_mask for p in prompts], dim=1),
            keys_values=_stack_left_padded([p.keys_values for p in prompts], dim=4),
            keys_values_mask=_stack_left_padded([p.keys_values_mask for p in prompts], dim=1),
            updates=Updates.stack([p.updates for p in prompts], [p.rows for p in prompts]),
        )

    @property
    def rows(self) -> int:
        """Number of rows `b`."""
        return self.vectors.shape[0]

    def lengths(self) -> Tensor:
        """Window positions that each row's prompt takes, `[b]` int64."""
        return self.vector_mask.sum(1) + self.keys_values_mask.sum(1)

    def select(self, rows: Sequence[int] | Tensor) -> Prompt:
        """Return the prompts of some rows, in that order."""
        index = torch.as_tensor(rows, device=self.vectors.device)
        return Prompt(
            vectors=self.vectors[index],
            vector_mask=self.vector_mask[index],
            keys_values=self.keys_values[index],
            keys_values_mask=self.keys_values_mask[index],
            shared=self.shared,
            updates=self.updates.select(index.tolist()) if self.updates else None,
        )


def _stack_left_padded(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along rows after zero-padding `dim` on the left, and empty dims to full."""
    full = [max(t.shape[i] for t in tensors) for i in range(tensors[0].dim())]
    padded = []
    for tensor in tensors:
        shape = [tensor.shape[0], *full[1:]]
        if list(tensor.shape) == shape:
            padded.append(tensor)
        elif tensor.numel() == 0:
            padded.append(tensor.new_zeros(shape))
        else:
            pad = [0, 0] * (tensor.dim() - 1 - dim) + [full[dim] - tensor.shape[dim], 0]
            padded.append(torch.nn.functional.pad(tensor, pad))
    return torch.cat(padded)
