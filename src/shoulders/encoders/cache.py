"""Encoder outputs by content hash: a frozen encoder reads each text once, ever.

They are kept on disk, or, where the encoder's may not be (a server's), the most recent in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.files import cache_folder
from shoulders.store import ArrayStore, RecentArrays

RECENT = 64  # texts: several passes and rounds read the same one


class EncoderCache:
    """Cached states of one frozen encoder.

    Every text is encoded alone, so that its states are a function of the text only (and of how many
    threads compute, which is part of their key): a value from the cache equals a fresh one bit for
    bit, whatever batch it was first seen in, and a resumed run equals an undisturbed one.
    """

    def __init__(self, encoder: FrozenEncoder, folder: Path | None = None) -> None:
        self._encoder = encoder
        self._store: ArrayStore | RecentArrays = RecentArrays(RECENT)
        if encoder.on_disk:
            # By the weights bit by bit: a fingerprint is that of bfloat16.
            name = f"{encoder.digest()[:32]}-{encoder.fingerprint[32:]}.sqlite"
            path = (folder or cache_folder() / "encoder") / name
            self._store = ArrayStore(path, encoder.hidden_size)

    def states(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return states `[b, t, e]` float32 and bool mask `[b, t]` of `b` texts."""
        rows = [self._one(text) for text in texts]
        longest = max(len(row) for row in rows)
        states = torch.zeros(len(rows), longest, self._encoder.hidden_size)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, row in enumerate(rows):
            states[i, : len(row)] = torch.from_numpy(row)
            mask[i, : len(row)] = True
        device = self._encoder.device
        return states.to(device), mask.to(device)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    def _one(self, text: str) -> np.ndarray:
        key = hashlib.sha256(f"{torch.get_num_threads()} {text}".encode()).digest()
        found = self._store.get(key)
        if found is not None:
            return found
        with torch.no_grad():
            states, _ = self._encoder.states(self._encoder.tokenize([text]))
        row: np.ndarray = states[0].float().cpu().numpy()
        self._store.put(key, row)
        return row
