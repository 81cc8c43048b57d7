"""Chunk KV in host memory, least recently used out first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import replace

from ..chunks import ChunkKV
from .base import Entry, StoreStats


class MemoryStore:
    """A `ChunkStore` of at most ``cap`` bytes."""

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self._chunks: OrderedDict[str, ChunkKV] = OrderedDict()
        self._stats = StoreStats()
        self._lock = threading.Lock()

    def get(self, key: str) -> ChunkKV | None:
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is None:
                self._stats.misses += 1
                return None
            self._stats.hits += 1
            self._chunks.move_to_end(key)
            return chunk

    def put(self, key: str, chunk: ChunkKV) -> bool:
        with self._lock:
            if key in self._chunks:
                return True
            if chunk.nbytes > self.cap:
                self._stats.failed_puts += 1
                return False
            self._chunks[key] = chunk
            self._stats.nbytes += chunk.nbytes
            while self._stats.nbytes > self.cap:
                _, old = self._chunks.popitem(last=False)
                self._stats.nbytes -= old.nbytes
                self._stats.evicted += 1
            return True

    def delete(self, keys: Collection[str]) -> None:
        with self._lock:
            for key in keys:
                if (chunk := self._chunks.pop(key, None)) is not None:
                    self._stats.nbytes -= chunk.nbytes

    def entries(self) -> Iterator[Entry]:
        with self._lock:
            snapshot = list(self._chunks.items())
        return (Entry(key, chunk.text, chunk.nbytes, chunk.company, chunk.joint) for key, chunk in snapshot)

    def refresh(self) -> bool:
        return False

    def stats(self) -> StoreStats:
        with self._lock:
            stats, chunks = replace(self._stats), list(self._chunks.values())
        stats.entries, stats.fused = len(chunks), sum(bool(chunk.company) for chunk in chunks)
        stats.memory_bytes = stats.nbytes
        return stats

    def __contains__(self, key: object) -> bool:
        return key in self._chunks
