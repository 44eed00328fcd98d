"""Float arrays on disk by content hash: what a frozen model computes need be computed once, ever.

SQLite holds them: one file, safe against kills and concurrent processes, mapped into memory.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

from shoulders.files import writing_to

WAIT = 30.0  # seconds for another process to make the store
MAPPED = 1 << 34  # bytes of the file that SQLite may map


class ArrayStore:
    """Arrays `[t, width]` float32 by key, from any thread."""

    def __init__(self, path: Path, width: int) -> None:
        self._width = width
        self._lock = threading.Lock()
        with writing_to(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = self._opened(path)
        except sqlite3.OperationalError:
            # On a file system that SQLite cannot use: keep them in memory instead.
            self._db = self._open(":memory:")
        except sqlite3.DatabaseError:
            # A damaged store costs only recomputing: start it again.
            path.unlink(missing_ok=True)
            self._db = self._open(path)

    def get(self, key: bytes) -> np.ndarray | None:
        """Return a copy of what was put under `key`, or None."""
        # A store that cannot be read or written (disk full, damaged page) only costs time.
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):
            query = "SELECT states FROM outputs WHERE key = ?"
            found = self._db.execute(query, (key,)).fetchone()
            if found is not None and len(found[0]) % (4 * self._width) == 0:
                return np.frombuffer(found[0], dtype=np.float32).reshape(-1, self._width).copy()
        return None

    def put(self, key: bytes, value: np.ndarray) -> None:
        """Keep `value` `[t, width]` float32."""
        with self._lock, contextlib.suppress(sqlite3.DatabaseError):
            insert = "INSERT OR REPLACE INTO outputs VALUES (?, ?)"
            self._db.execute(insert, (key, value.tobytes()))

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @classmethod
    def _opened(cls, path: Path) -> sqlite3.Connection:
        until = time.monotonic() + WAIT
        while True:
            try:
                return cls._open(path)
            except sqlite3.OperationalError as error:
                # Processes that begin together: one turns logging on, which waits for nobody.
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)

    @staticmethod
    def _open(path: Path | str) -> sqlite3.Connection:
        # Several threads ask; the lock lets one at a time use the connection.
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")  # losing entries in a power cut is harmless
        db.execute(f"PRAGMA mmap_size = {MAPPED}")
        db.execute("CREATE TABLE IF NOT EXISTS outputs (key BLOB PRIMARY KEY, states BLOB)")
        return db


class RecentArrays:
    """The most recently used arrays, in memory alone, from any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def get(self, key: bytes) -> np.ndarray | None:
        """Return a copy of what was put under `key`, or None."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key].copy()

    def put(self, key: bytes, value: np.ndarray) -> None:
        """Keep `value`; what was used least recently goes."""
        with self._lock:
            self._kept[key] = value.copy()
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def close(self) -> None:
        """Let all of them go."""
        self._kept.clear()
