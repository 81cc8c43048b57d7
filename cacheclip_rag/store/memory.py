"""Chunk KV in host memory, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import replace

from ..chunks import ChunkKV
from .base import Entry, StoreStats


class Memory:
    """At most ``cap`` bytes for all stores in it: the chunk used longest ago goes first, whoever's it is.

    `MemoryStore` reaches into it, under its lock; it knows no store, so that nothing is kept alive by a circle.
    """

    def __init__(self, cap: int) -> None:
        self.cap, self.nbytes = cap, 0
        self.lock = threading.Lock()
        self.chunks: OrderedDict[tuple[int, str], tuple[ChunkKV, StoreStats]] = OrderedDict()
        """By store and key, the least recently used first, with the counts of the store whose chunk it is."""
        self.stores = 0

    def add(self, place: tuple[int, str], chunk: ChunkKV, stats: StoreStats) -> None:
        self.chunks[place] = chunk, stats
        self._count(chunk, stats, 1)
        while self.nbytes > self.cap:
            _, (old, others) = self.chunks.popitem(last=False)
            self._count(old, others, -1)
            others.evicted += 1

    def remove(self, place: tuple[int, str]) -> None:
        if (found := self.chunks.pop(place, None)) is not None:
            self._count(*found, -1)

    def _count(self, chunk: ChunkKV, stats: StoreStats, sign: int) -> None:
        self.nbytes += sign * chunk.nbytes
        stats.nbytes += sign * chunk.nbytes
        stats.entries += sign
        stats.fused += sign * bool(chunk.context)


class MemoryStore:
    """A `ChunkStore` of at most ``memory`` bytes, or in a `Memory` that it shares with others."""

    def __init__(self, memory: int | Memory) -> None:
        self._memory = Memory(memory) if isinstance(memory, int) else memory
        self._stats = StoreStats()
        with self._memory.lock:
            self._memory.stores += 1
            self._number = self._memory.stores

    @property
    def cap(self) -> int:
        return self._memory.cap

    def get(self, key: str) -> ChunkKV | None:
        with self._memory.lock:
            found = self._memory.chunks.get((self._number, key))
            if found is None:
                self._stats.misses += 1
                return None
            self._stats.hits += 1
            self._memory.chunks.move_to_end((self._number, key))
            return found[0]

    def put(self, key: str, chunk: ChunkKV) -> bool:
        with self._memory.lock:
            if (self._number, key) in self._memory.chunks:
                return True
            if chunk.nbytes > self.cap:
                self._stats.failed_puts += 1
                return False
            self._memory.add((self._number, key), chunk, self._stats)
            return True

    def delete(self, keys: Collection[str]) -> None:
        with self._memory.lock:
            for key in keys:
                self._memory.remove((self._number, key))

    def entries(self) -> Iterator[Entry]:
        with self._memory.lock:
            mine = [(key, chunk) for (number, key), (chunk, _) in self._memory.chunks.items() if number == self._number]
        return (Entry(key, chunk.text, chunk.nbytes, chunk.context, chunk.in_sequence) for key, chunk in mine)

    def refresh(self) -> bool:
        return False

    changes = 0

    def vanished(self) -> list[str]:
        return []

    def forgettings(self) -> bytes:
        return b""

    def stats(self) -> StoreStats:
        with self._memory.lock:
            return replace(self._stats, memory_bytes=self._stats.nbytes)

    def __contains__(self, key: object) -> bool:
        return (self._number, key) in self._memory.chunks
