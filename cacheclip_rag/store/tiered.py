"""Tiers of stores as one: the nearest that has a chunk serves it, and the nearer ones take a copy."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..chunks import ChunkKV
from .base import ChunkStore, Entry, StoreStats


class TieredStore:
    """``tiers`` from the nearest (memory) to the farthest, which is the one that keeps what the others evict."""

    def __init__(self, *tiers: ChunkStore) -> None:
        self.tiers = tiers

    def get(self, key: str) -> ChunkKV | None:
        for level, tier in enumerate(self.tiers):
            if (chunk := tier.get(key)) is not None:
                for nearer in self.tiers[:level]:
                    nearer.put(key, chunk)
                return chunk
        return None

    def put(self, key: str, chunk: ChunkKV) -> bool:
        kept = [tier.put(key, chunk) for tier in self.tiers]
        return any(kept)

    def delete(self, keys: Collection[str]) -> None:
        for tier in self.tiers:
            tier.delete(keys)

    def entries(self) -> Iterator[Entry]:
        seen: set[str] = set()
        for tier in reversed(self.tiers):
            for entry in tier.entries():
                if entry.key not in seen:
                    seen.add(entry.key)
                    yield entry

    def refresh(self) -> bool:
        return any([tier.refresh() for tier in self.tiers])

    def stats(self) -> StoreStats:
        """The farthest tier's."""
        return self.tiers[-1].stats()

    def __contains__(self, key: object) -> bool:
        return any(key in tier for tier in self.tiers)
