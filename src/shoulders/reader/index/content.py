"""A hash of a set of passages that can grow and shrink."""

from __future__ import annotations

import hashlib

from shoulders.reader.passage import Passage

_MODULUS = 1 << 256


class Content:
    """The sum of the passages' hashes: the same for the same passages, in whatever order.

    Adding one and taking it away again gives the sum of before, so that an index that was grown,
    killed or pruned can be compared with one built at once. (An additive multiset hash, Clarke
    et al. 2003, with BLAKE2b; against accidents, not against attackers.)
    """

    def __init__(self, hexadecimal: str = "0") -> None:
        self._sum = int(hexadecimal, 16)

    def add(self, passage: Passage) -> None:
        """Count a passage in."""
        self._sum = (self._sum + _hash(passage)) % _MODULUS

    def remove(self, passage: Passage) -> None:
        """Take out a passage that was counted in."""
        self._sum = (self._sum - _hash(passage)) % _MODULUS

    def hex(self) -> str:
        """Return the sum as 64 hex digits."""
        return f"{self._sum:064x}"


def _hash(passage: Passage) -> int:
    digest = hashlib.blake2b(digest_size=32)
    for field in (passage.id, passage.title, passage.text, passage.source):
        raw = field.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return int.from_bytes(digest.digest(), "little")
