"""Encoder outputs on disk, by content hash: a frozen encoder reads each text once, ever.

SQLite holds them: one file per encoder, safe against kills and concurrent processes, read
through the page cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoulders.encoders.frozen import FrozenEncoder
from shoulders.files import cache_folder, writing_to


class EncoderCache:
    """Cached states of one frozen encoder.

    Every text is encoded alone, so that its states are a function of the text only: a value
    from the cache equals a fresh one bit for bit, whatever batch it was first seen in, and
    a resumed run equals an undisturbed one.
    """

    def __init__(self, encoder: FrozenEncoder, folder: Path | None = None) -> None:
        self._encoder = encoder
        self._lock = threading.Lock()
        path = (folder or cache_folder() / "encoder") / f"{encoder.fingerprint}.sqlite"
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = self._open(path)
        except sqlite3.OperationalError:
            # Locked, or on a file system that SQLite cannot use: cache in memory instead.
            self._db = self._open(":memory:")
        except sqlite3.DatabaseError:
            # A damaged cache costs only recomputing: start it again.
            path.unlink(missing_ok=True)
            self._db = self._open(path)

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
        self._db.close()

    def _one(self, text: str) -> np.ndarray:
        key = hashlib.sha256(text.encode()).digest()
        width = self._encoder.hidden_size
        # A cache that cannot be read or written (disk full, damaged page) only costs time.
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):
            query = "SELECT states FROM outputs WHERE key = ?"
            found = self._db.execute(query, (key,)).fetchone()
            if found is not None and len(found[0]) % (4 * width) == 0:
                return np.frombuffer(found[0], dtype=np.float32).reshape(-1, width).copy()
        with torch.no_grad():
            states, _ = self._encoder.states(self._encoder.tokenize([text]))
        row = states[0].float().cpu().numpy()
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):
            insert = "INSERT OR REPLACE INTO outputs VALUES (?, ?)"
            self._db.execute(insert, (key, row.tobytes()))
        return row

    @staticmethod
    def _open(path: Path | str) -> sqlite3.Connection:
        # Several threads read prompts; `_one` lets one at a time use the connection.
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")  # losing entries in a power cut is harmless
        db.execute("CREATE TABLE IF NOT EXISTS outputs (key BLOB PRIMARY KEY, states BLOB)")
        return db
