"""Several stores as tiers of one: the nearest that has a chunk serves it, and those before it keep a copy."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from ..chunks import ChunkKV
from .base import ChunkStore, Entry, StoreStats
from .disk import DiskStore
from .memory import MemoryStore
from .remote import RemoteStore


@dataclass(eq=False)
class _Read:
    """A look-up under way, and whether its key was deleted meanwhile."""

    key: str
    deleted: bool = False


class TieredStore:
    """``tiers`` from the nearest (memory) to the farthest, which is the one that keeps what the others evict.

    ``remote`` stands behind them all: it is asked for what none of them has and given a copy of everything, but what is
    stored, in number and size, is what the tiers hold.
    """

    def __init__(self, *tiers: ChunkStore, remote: ChunkStore | None = None) -> None:
        self.tiers, self.remote = tiers, remote
        self._all = tiers if remote is None else (*tiers, remote)
        self._reads: list[_Read] = []
        self._vanished: set[str] = set()
        self._lock = threading.Lock()
        self._copying = threading.Lock()
        self._forgettings = self.forgettings()

    def get(self, key: str) -> ChunkKV | None:
        if (chunk := self._all[0].get(key)) is not None:
            self._touch(key, 0)
            return chunk
        read, before = _Read(key), self.forgettings() if self.remote is not None else b""
        with self._lock:
            self._reads.append(read)
        try:
            for level, tier in enumerate(self._all[1:], start=1):
                if (chunk := tier.get(key)) is not None:
                    with self._copying:
                        if read.deleted:  # since it began: a copy would bring it back
                            return None
                        for nearer in self._all[:level]:
                            nearer.put(key, chunk)
                    self._touch(key, level)
                    if level < len(self.tiers) or self.forgettings() == before:
                        return chunk
                    # Another process may have forgotten it, here and at the remote, while it was fetched.
                    for nearer in self.tiers:
                        nearer.delete([key])
                    return None
        finally:
            with self._lock:
                self._reads.remove(read)
        return None

    def _touch(self, key: str, level: int) -> None:
        """What memory serves all the time must not be the oldest on a disk."""
        for farther in self._all[level + 1 :]:
            if isinstance(farther, DiskStore):
                farther.touch(key)

    def put(self, key: str, chunk: ChunkKV) -> bool:
        kept = [tier.put(key, chunk) for tier in self._all]
        return any(kept)

    def delete(self, keys: Collection[str]) -> None:
        with self._copying, self._lock:
            for read in self._reads:
                read.deleted |= read.key in keys
        for tier in self._all:
            tier.delete(keys)

    def entries(self) -> Iterator[Entry]:
        seen: set[str] = set()
        for tier in reversed(self.tiers):
            for entry in tier.entries():
                if entry.key not in seen:
                    seen.add(entry.key)
                    yield entry

    def refresh(self) -> bool:
        """What another process removed from a disk is not served from memory either: it may have been forgotten."""
        forgettings = self.forgettings()
        changed = any([tier.refresh() for tier in self.tiers])
        for level, tier in enumerate(self.tiers):
            self._let_go(tier.vanished(), self.tiers[:level])
        if forgettings != self._forgettings:
            # What was forgotten may be here and in no file: not kept by a full disk, or evicted since.
            *nearer, farthest = self.tiers
            only_here = {entry.key for tier in nearer for entry in tier.entries() if entry.key not in farthest}
            if isinstance(self.remote, RemoteStore):
                only_here |= self.remote.known() - {key for key in self.remote.known() if key in farthest}
            self._let_go(only_here, nearer)
            self._forgettings = forgettings
            changed = True
        return changed

    def _let_go(self, gone: Collection[str], tiers: Sequence[ChunkStore]) -> None:
        """Another process removed these, and they are not to be served from these tiers, nor uploaded."""
        if not gone:
            return
        with self._copying, self._lock:  # a look-up that has read one already must not bring it back
            for read in self._reads:
                read.deleted |= read.key in gone
        for tier in tiers:
            tier.delete(gone)
        if isinstance(self.remote, RemoteStore):
            self.remote.let_go(gone)
        with self._lock:
            self._vanished.update(gone)

    @property
    def changes(self) -> int:
        return sum(tier.changes for tier in self.tiers)

    def vanished(self) -> list[str]:
        with self._lock:
            gone, self._vanished = self._vanished, set()
        return list(gone)

    def holding(self, keys: Collection[str] = ()) -> AbstractContextManager[None]:
        """In the tier that keeps what the others evict."""
        return self._keeper.holding(keys)

    def room(self) -> int | None:
        return self._keeper.room()

    def fitting(self, texts: Sequence[str]) -> int:
        return self._keeper.fitting(texts)

    @property
    def _keeper(self) -> ChunkStore:
        in_memory = self.remote is not None and isinstance(self.tiers[-1], MemoryStore)
        return self.remote if self.remote is not None and in_memory else self.tiers[-1]

    def forgettings(self) -> bytes:
        return self.tiers[-1].forgettings()

    def stats(self) -> StoreStats:
        """What is kept and what was not: the farthest tier's, the remote one not counted. A chunk that any of them had
        is a hit; what none of them had, the remote one included, is a miss.
        """
        each = [tier.stats() for tier in self._all]
        return replace(
            each[len(self.tiers) - 1],
            hits=sum(stats.hits for stats in each),
            misses=each[-1].misses,
            memory_bytes=sum(stats.memory_bytes for stats in each),
            disk_bytes=sum(stats.disk_bytes for stats in each),
        )

    def __contains__(self, key: object) -> bool:
        return any(key in tier for tier in self._all)
