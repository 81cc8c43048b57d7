"""One budget for all KV in memory, and chunks kept under it, least recently used out first."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from ..chunks import ChunkKV
from .base import Entry, StoreStats

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Evictable(Protocol):
    """A cache whose bytes a `MemoryBudget` counts. All of it is called under the budget's lock."""

    kind: str
    nbytes: int
    held_bytes: int
    """Those that must stay for now."""

    @property
    def oldest(self) -> int:
        """The tick (`MemoryBudget.ticks`) at which what was used longest ago was used; `NEVER` if nothing may go."""

    def evict(self) -> bool:
        """Drop something that may go; False where there is nothing."""


NEVER = 1 << 62


class MemoryBudget:
    """At most ``cap`` bytes for the values of all its caches together; the cache with the value that was used longest
    ago evicts first.

    It keeps no cache alive; a cache that is gone takes no room. Thread-safe, and so are its caches.
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.lock = threading.RLock()  # reentrant: a cache that is collected meanwhile is no longer counted
        self.ticks = itertools.count()
        self._caches: weakref.WeakSet[Evictable] = weakref.WeakSet()

    @property
    def nbytes(self) -> int:
        with self.lock:
            return sum(cache.nbytes for cache in self._caches)

    def by_kind(self) -> dict[str, int]:
        """The bytes of each kind of thing (`LRUCache.kind`); what there is none of is left out."""
        with self.lock:
            found = Counter[str]()
            for cache in self._caches:
                found[cache.kind] += cache.nbytes
        return {kind: nbytes for kind, nbytes in sorted(found.items()) if nbytes}

    def add(self, cache: Evictable) -> None:
        with self.lock:
            self._caches.add(cache)

    @property
    def room(self) -> int:
        """The bytes that can be added with everything evicted that may be."""
        return self.cap - sum(cache.held_bytes for cache in self._caches)

    @property
    def spare_bytes(self) -> int:
        """The bytes that can be added with nothing evicted."""
        return self.cap - self.nbytes

    def shrink(self) -> None:
        """Evict until all of it fits. Under the lock, together with what made it grow."""
        while self.nbytes > self.cap:
            oldest = min(self._caches, key=lambda cache: cache.oldest, default=None)
            if oldest is None or not oldest.evict():
                return


@dataclass
class _Item(Generic[V]):
    value: V
    nbytes: int
    tick: int


class LRUCache(Generic[K, V]):
    """Values by key in a `MemoryBudget`; any of them may be gone at any time, evicted for something else.

    KV that is cached in memory is kept here, so that one cap counts it and `MemoryBudget.by_kind` shows it. ``kind``
    says what the values are. ``evicted`` is called with each evicted value, under the budget's lock: it must not wait
    for anything.
    """

    def __init__(self, memory: MemoryBudget, kind: str, evicted: Callable[[V], None] | None = None) -> None:
        self._memory, self.kind, self._evicted = memory, kind, evicted
        self._items: OrderedDict[K, _Item[V]] = OrderedDict()
        self._held: set[K] | None = None
        self._holders = 0
        self.nbytes = self.held_bytes = 0
        memory.add(self)

    def get(self, key: K) -> V | None:
        """The value, which is then the one used last; None where there is none."""
        with self._memory.lock:
            item = self._items.get(key)
            if item is None:
                return None
            item.tick = next(self._memory.ticks)
            self._items.move_to_end(key)
            return item.value

    def put(self, key: K, value: V, nbytes: int, spare: bool = False) -> bool:
        """Keep it, in the place of what was there. False where it, with what must stay, is more than fits.

        ``spare``: False also where something would have to be evicted for it; and until `get` it is the first to go.
        """
        with self._memory.lock:
            if nbytes > (self._memory.spare_bytes if spare else self._memory.room):
                return False
            self.pop(key)
            tick = next(self._memory.ticks)
            self._items[key] = _Item(value, nbytes, -tick if spare else tick)
            if spare:
                self._items.move_to_end(key, last=False)
            self.nbytes += nbytes
            if self._held is not None and not spare:
                self._held.add(key)
                self.held_bytes += nbytes
            self._memory.shrink()
            return True

    def pop(self, key: K) -> V | None:
        with self._memory.lock:
            item = self._items.pop(key, None)
            if item is None:
                return None
            self.nbytes -= item.nbytes
            if self._held is not None and key in self._held:
                self._held.discard(key)
                self.held_bytes -= item.nbytes
            return item.value

    def items(self) -> list[tuple[K, V]]:
        """What is here, the least recently used first; to look at it does not use it."""
        with self._memory.lock:
            return [(key, item.value) for key, item in self._items.items()]

    def clear(self) -> None:
        with self._memory.lock:
            for key in list(self._items):
                self.pop(key)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __len__(self) -> int:
        return len(self._items)

    @contextmanager
    def holding(self, keys: Collection[K]) -> Iterator[None]:
        """Meanwhile neither these are evicted nor what is put."""
        with self._memory.lock:
            self._holders += 1
            self._held = (self._held or set()) | {key for key in keys if key in self._items}
            self.held_bytes = sum(self._items[key].nbytes for key in self._held)
        try:
            yield
        finally:
            with self._memory.lock:
                self._holders -= 1
                if not self._holders:  # holds of several threads overlap in any order
                    self._held, self.held_bytes = None, 0

    @property
    def room(self) -> int | None:
        """Bytes that may come while something is held; None where anything may be evicted for it."""
        with self._memory.lock:
            return None if self._held is None else self._memory.room

    # ---- for the memory ---------------------------------------------------------------------------------------------

    @property
    def oldest(self) -> int:
        """When what would go first was used last; `NEVER` where nothing may go."""
        key = self._first()
        return NEVER if key is None else self._items[key].tick

    def evict(self) -> bool:
        """Drop what was used longest ago, of what is not held; False where there is none."""
        key = self._first()
        value = None if key is None else self.pop(key)
        if value is None:
            return False
        if self._evicted is not None:
            self._evicted(value)
        return True

    def _first(self) -> K | None:
        return next((key for key in self._items if not self._held or key not in self._held), None)


class MemoryStore:
    """A `ChunkStore` of at most ``memory`` bytes, or in a `MemoryBudget` that it shares with others."""

    def __init__(self, memory: int | MemoryBudget) -> None:
        self._memory = MemoryBudget(memory) if isinstance(memory, int) else memory
        self._stats = stats = StoreStats()

        def evicted(chunk: ChunkKV) -> None:
            stats.evicted += 1
            stats.fused -= bool(chunk.context)

        self._chunks: LRUCache[str, ChunkKV] = LRUCache(self._memory, "chunks", evicted=evicted)

    @property
    def cap(self) -> int:
        return self._memory.cap

    def get(self, key: str) -> ChunkKV | None:
        with self._memory.lock:
            chunk = self._chunks.get(key)
            self._stats.hits += chunk is not None
            self._stats.misses += chunk is None
            return chunk

    def put(self, key: str, chunk: ChunkKV) -> bool:
        return self._put(key, chunk, spare=False)

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        return self._put(key, chunk, spare=True)

    def _put(self, key: str, chunk: ChunkKV, *, spare: bool) -> bool:
        with self._memory.lock:
            if key in self._chunks:
                return True
            kept = self._chunks.put(key, chunk, chunk.nbytes, spare)
            self._stats.failed_puts += not kept and not spare
            self._stats.fused += kept and bool(chunk.context)
            return kept

    def spare_bytes(self) -> int:
        return self._memory.spare_bytes

    def delete(self, keys: Collection[str]) -> None:
        with self._memory.lock:
            for key in keys:
                if (chunk := self._chunks.pop(key)) is not None:
                    self._stats.fused -= bool(chunk.context)

    def entries(self) -> Iterator[Entry]:
        return (
            Entry(key, chunk.text, chunk.nbytes, chunk.context, chunk.in_sequence)
            for key, chunk in self._chunks.items()
        )

    def refresh(self) -> bool:
        return False

    changes = 0

    def vanished(self) -> list[str]:
        return []

    def forgettings(self) -> bytes:
        return b""

    @contextmanager
    def holding(self, keys: Collection[str] = ()) -> Iterator[None]:
        with self._chunks.holding(keys):
            yield

    def room(self) -> int | None:
        return self._chunks.room

    def fitting(self, texts: Sequence[str]) -> int:
        kept = [(len(chunk.text), chunk.nbytes) for _, chunk in self._chunks.items()]
        return count_fitting(texts, self._chunks.room, kept)

    def stats(self) -> StoreStats:
        with self._memory.lock:
            nbytes = self._chunks.nbytes
            return replace(self._stats, entries=len(self._chunks), nbytes=nbytes, memory_bytes=nbytes)

    def __contains__(self, key: object) -> bool:
        return key in self._chunks


def count_fitting(texts: Sequence[str], room: int | None, kept: Sequence[tuple[int, int]]) -> int:
    """How many of these chunks, from the first on, fit into so many bytes, if they take as many for each character as
    what is ``kept``: ``(characters, bytes)``. All of them where nothing is known.
    """
    characters = sum(count for count, _ in kept)
    if room is None or not characters:
        return len(texts)
    each = sum(nbytes for _, nbytes in kept) / characters
    for number, text in enumerate(texts):
        room -= int(len(text) * each)
        if room < 0:
            return number
    return len(texts)
