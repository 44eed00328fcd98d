"""`FrozenEncoder`: a bidirectional text encoder whose weights never change."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoulders.fingerprint import digest, identity, tokenizer_digest


class FrozenEncoder:
    """A Hugging Face text encoder, frozen and in eval mode: texts -> states `[b, t, e]`.

    Args:
        model, tokenizer: as loaded.
        name: where from.
        on_disk: whether what it has computed may be kept on disk (`EncoderCache`): of data that is
            read again and again, not of what strangers ask a server.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, *, on_disk: bool = True) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.on_disk = on_disk
        self._asking = threading.Lock()
        self._embedding = model.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        """Width `e` of the encoder's states."""
        return int(self.model.config.hidden_size)

    @property
    def embedding_size(self) -> int:
        """Width of what its layers are given: of soft prompts, too."""
        return int(self._embedding.weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights."""
        return self._embedding.weight.device

    def beside(self, device: torch.device) -> FrozenEncoder:
        """Return itself, moved to a device: that of the LM it is an encoder for."""
        if self.device != device:
            self.model.to(device)
        return self

    @property
    def max_tokens(self) -> int:
        """Longest input in tokens; what is longer loses its end (the LM still reads it all)."""
        positions = getattr(self.model.config, "max_position_embeddings", None)
        return min(int(positions or 512), 512)

    @property
    def parameters(self) -> int:
        """Number of frozen parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @functools.cached_property
    def embedding_scale(self) -> float:
        """Standard deviation of the token embeddings, for a soft prompt beside them."""
        return float(self._embedding.weight.float().std())

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of weights and tokenizer (64 hex digits), computed on first use."""
        return identity(self.model.named_parameters())[:32] + tokenizer_digest(self.tokenizer)[:32]

    def digest(self) -> str:
        """Return the SHA-256 over every byte of every weight as it is now (promise 1)."""
        return digest(self.model.named_parameters())

    def tokenize(
        self,
        texts: Sequence[str],
        room: int = 0,
        *,
        second: Sequence[str] | None = None,
        most: int | None = None,
    ) -> list[list[int]]:
        """Return token ids of each text with the encoder's special tokens.

        Args:
            texts: one for each row.
            room: positions that are kept for a soft prompt.
            second: of pairs, whose first segments are `texts`.
            most: tokens to cut to; None: what the encoder reads.
        """
        limit = (most or self.max_tokens) - room
        both = [list(texts)] if second is None else [list(texts), list(second)]
        # A fast tokenizer keeps in itself where it cuts: another thread must not change that.
        with self._asking:
            ids: list[list[int]] = self.tokenizer(*both, truncation=True, max_length=limit)[
                "input_ids"
            ]
        return ids

    def states(
        self, ids: Sequence[Sequence[int]], soft_prompt: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode `b` rows of token ids.

        Args:
            ids: token ids per row.
            soft_prompt: learned vectors `[q, e_in]` put before every row's token embeddings
                (the paper's prompt-tuned encoder); gradients reach them, never the weights.

        Returns:
            States `[b, q + t, e]` and a bool mask `[b, q + t]`, True where real.
        """
        longest = max(len(row) for row in ids)
        padded = torch.zeros(len(ids), longest, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.bool)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        padded, mask = padded.to(self.device), mask.to(self.device)
        embedded = self._embedding(padded)
        if soft_prompt is not None:
            q = soft_prompt.shape[0]
            embedded = torch.cat([soft_prompt.expand(len(ids), -1, -1), embedded], 1)
            mask = torch.cat([mask.new_ones(len(ids), q), mask], 1)
        output = self.model(inputs_embeds=embedded, attention_mask=mask.long())
        return output.last_hidden_state, mask
