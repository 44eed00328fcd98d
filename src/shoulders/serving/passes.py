"""Every pass of the rows that a worker decodes: their slots, and what their links remember."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from shoulders.lm.frozen import FrozenLM
from shoulders.lm.updates import Updates
from shoulders.recursion.chain import carried
from shoulders.recursion.memory import Memory
from shoulders.serving.pool import Pool
from shoulders.serving.rows import Entry, Row

LAST = -1  # the pool that the last passes of all rows share


class Passes:
    """Slots of every pass, whatever the rows' skills.

    Args:
        lm: with fused layers.
        most: bytes that all slots may take.
    """

    def __init__(self, lm: FrozenLM, most: int) -> None:
        self._lm, self._most = lm, most
        self.pools: dict[int, Pool] = {}
        self.memories: dict[tuple[int, int], Memory] = {}

    # -- slots ---------------------------------------------------------------------------

    def enter(self, entry: Entry) -> list[int]:
        """Return a slot in each pass for an entry, or take none at all."""
        room = entry.positions(self._lm.seen_whole)
        slots: list[int] = []
        try:
            for i, prompt in enumerate([*(hop.prompt for hop in entry.hops), entry.prompt]):
                slots.append(self._growing(_level(entry, i)).enter(prompt, room))
        except Exception:
            self._give_back(entry, slots)
            raise
        return slots

    def copy(self, row: Row, count: int) -> list[list[int]]:
        """Return the slots of `count` further rows, in each pass, that hold what one row's hold."""
        entry = row.entry
        copies = [
            self._growing(_level(entry, i)).copy(slot, count) for i, slot in enumerate(row.slots)
        ]
        for number, hop in enumerate(entry.hops):
            if copies[number]:
                memory = self.memories[id(hop.link), number]
                memory.copy(row.slots[number], torch.tensor(copies[number]))
        return [[own[k] for own in copies] for k in range(count)]

    def leave(self, row: Row, others: Collection[Row]) -> None:
        """Give a row's slots back; `others` stay."""
        self._give_back(row.entry, row.slots)
        kept = {(id(h.link), i) for other in others for i, h in enumerate(other.entry.hops)}
        # Nobody is here: let the memory go; the link's skill may be served no more.
        self.memories = {key: m for key, m in self.memories.items() if key in kept}

    def clear(self) -> None:
        """Forget all rows."""
        self.pools, self.memories = {}, {}

    def fits(self, entry: Entry, rows: Collection[Row]) -> bool:
        """Tell whether all slots stay within their bytes where an entry joins rows."""
        taken = sum(
            self._pool(level).bytes_with(
                sum(_slots(own, level) * own.rows for own in entry.every)
                + sum(_slots(r.entry, level) * (r.entry.rows - 1) for r in rows if not r.running),
                max((own.positions(self._lm.seen_whole) for own in entry.every), default=0),
            )
            for level in {*self.pools, *range(len(entry.hops)), LAST}
        )
        return taken <= self._most

    def trim(self, rows: Collection[Row]) -> None:
        """Let go of what rows that have left took, see `Pool.trim`."""
        for level, pool in self.pools.items():
            own = [row.entry for row in rows if _slots(row.entry, level)]
            pool.trim(max((one.positions(self._lm.seen_whole) for one in own), default=0))

    # -- reading -------------------------------------------------------------------------

    def read(self, rows: Sequence[Row], pieces: Sequence[Sequence[int]]) -> list[Tensor]:
        """Read the rows' next tokens in one call per pass; return the last pass's states."""
        counts = [len(piece) for piece in pieces]
        embedded = list(self._lm.embed_rows(pieces).split(counts))
        current = embedded
        for number in range(max(len(row.entry.hops) for row in rows)):
            current = self._hop(number, rows, embedded, current)
        return self._read(LAST, rows, current)

    def _hop(
        self, number: int, rows: Sequence[Row], tokens: list[Tensor], current: list[Tensor]
    ) -> list[Tensor]:
        """Take the rows that have such a pass through it and its link."""
        links: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            if number < len(row.entry.hops):
                links.setdefault(id(row.entry.hops[number].link), []).append(i)
        found = list(current)
        for key, own in links.items():
            mine = [rows[i] for i in own]
            link = mine[0].entry.hops[number].link
            states = self._read(number, mine, [current[i] for i in own], link.taps)
            memory = self.memories.setdefault((key, number), Memory(0))
            slots = torch.tensor([row.slots[number] for row in mine])
            seen = torch.tensor([row.tokens for row in mine])
            counts = [len(tokens[i]) for i in own]
            written = carried(
                link,
                torch.cat(states, -2),
                torch.cat([tokens[i] for i in own]),
                counts,
                memory.view(slots, seen),
            )
            for i, piece in zip(own, written.split(counts), strict=True):
                found[i] = piece
        return found

    def _read(
        self,
        level: int,
        rows: Sequence[Row],
        current: Sequence[Tensor],
        taps: tuple[int, ...] = (),
    ) -> list[Tensor]:
        """Read one pass; prompt vectors stand before a row's first piece."""
        pieces, before, updates = [], [], []
        for row, own in zip(rows, current, strict=True):
            entry = row.entry
            prompt = entry.prompt if level == LAST else entry.hops[level].prompt
            updates.append(prompt.updates)
            vectors = prompt.vectors[0, prompt.vector_mask[0]] if row.tokens == 0 else None
            if vectors is not None and len(vectors):
                pieces.append(torch.cat([vectors.to(own), own]))
                before.append(len(vectors))
            else:
                pieces.append(own)
                before.append(0)
        slots = [row.slots[level] for row in rows]
        counts = [len(piece) for piece in pieces]
        together = Updates.stack(updates, [1] * len(rows))
        states = self._pool(level).read(torch.cat(pieces), counts, slots, taps, together)
        found = states.split(counts, -2)
        return [own[..., p:, :] for own, p in zip(found, before, strict=True)]

    def _give_back(self, entry: Entry, slots: Sequence[int]) -> None:
        for i, slot in enumerate(slots):
            self._pool(_level(entry, i)).leave(slot)

    def _growing(self, level: int) -> Pool:
        """Return a pool that may grow into what others leave."""
        pool = self._pool(level)
        pool.most = self._most - sum(one.bytes for one in self.pools.values() if one is not pool)
        return pool

    def _pool(self, level: int) -> Pool:
        if level not in self.pools:
            assert self._lm.blocks is not None  # the engine gives workers no other LM
            self.pools[level] = Pool(self._lm.blocks)
        return self.pools[level]


def _slots(entry: Entry, level: int) -> int:
    """Return how many slots one row of an entry takes of a pass's pool."""
    return int(level == LAST or level < len(entry.hops))


def _level(entry: Entry, number: int) -> int:
    """Return the key of a pass's pool: the last passes of all rows share one."""
    return number if number < len(entry.hops) else LAST
