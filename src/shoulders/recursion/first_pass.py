"""The states of a first pass without prompt, kept on disk: its inputs never change.

In training with teacher forcing inputs and answers are known, so that the frozen LM reads every
row once, and later epochs read the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoulders.files import cache_folder
from shoulders.lm.frozen import FrozenLM
from shoulders.lm.prompt import Prompt
from shoulders.lm.states import states
from shoulders.store import ArrayStore

VERSION = 2  # part of the file's name: raise it when a pass of the same weights changes its result


class FirstPass:
    """States of rows of token ids, each read alone.

    Alone, so that they are a function of the row only (and of how many threads compute, which is
    part of their key): a kept value equals a fresh one bit for bit, whichever batch it was first
    seen in, and a resumed run equals an undisturbed one.

    Args:
        lm: the frozen LM.
        taps: the layers that the first link reads, see `FrozenLM.hidden`.
        folder: where to keep them; by default the cache of this user.
    """

    def __init__(self, lm: FrozenLM, taps: Sequence[int] = (), folder: Path | None = None) -> None:
        self._lm, self._taps = lm, tuple(taps)
        layers = "-".join(map(str, self._taps)) or "last"
        # By what is computed with, bit by bit: a fingerprint is that of bfloat16.
        name = f"{lm.digest()[:32]}-{lm.precision}-{layers}-v{VERSION}.sqlite"
        path = (folder or cache_folder() / "first_pass") / name
        self._store = ArrayStore(path, max(1, len(self._taps)) * lm.hidden_size)
        self.read = 0  # rows that the LM had to read

    def __call__(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the rows' states end to end, `[t, d]`; with `k` taps `[k, t, d]`."""
        found = torch.from_numpy(np.concatenate([self._one(ids) for ids in token_ids]))
        found = found.to(self._lm.device, self._lm.dtype)
        if not self._taps:
            return found
        return found.view(len(found), len(self._taps), -1).transpose(0, 1)

    def close(self) -> None:
        """Close the file."""
        self._store.close()

    @torch.no_grad()
    def _one(self, ids: Sequence[int]) -> np.ndarray:
        key = hashlib.sha256(
            np.asarray([torch.get_num_threads(), *ids], dtype=np.int64).tobytes()
        ).digest()
        found = self._store.get(key)
        if found is not None:
            return found
        self.read += 1
        lm = self._lm
        nothing = Prompt.empty(1, lm.device)
        values = states(lm, nothing, lm.embed_rows([ids]), [len(ids)], taps=self._taps).values
        if self._taps:
            values = values.transpose(0, 1).flatten(1)
        row: np.ndarray = values[: len(ids)].float().cpu().numpy()
        self._store.put(key, row)
        return row
