"""Several stores as tiers of one: the nearest that has a chunk serves it, and those before it keep a copy."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

from ..background import Background
from ..chunks import ChunkKV
from .base import ChunkStore, Entry, StoreStats
from .disk import DiskStore
from .loading_cost import DISK, REMOTE, LoadingCost, NotWorthLoading
from .memory import MemoryStore
from .remote import RemoteStore

_PATIENCE = 30.0
"""Seconds that a look-up waits for another one of the same chunk before it looks itself."""


@dataclass(eq=False)
class _Read:
    """A look-up under way beyond the nearest tier, and whether its key was deleted meanwhile. ``busy`` is held until
    it is ``over``, with the ``chunk`` that was found; one that ``hangs`` is not waited for.
    """

    key: str
    deleted: bool = False
    hangs: bool = False
    over: bool = False
    chunk: ChunkKV | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)


class TieredStore:
    """``tiers`` from the nearest (memory) to the farthest, which is the one that keeps what the others evict.

    ``remote`` stands behind them all: it is asked for what none of them has and given a copy of everything, but what is
    stored, in number and size, is what the tiers hold. ``cost``: measures what loading takes, and says when computing
    is quicker.
    """

    def __init__(self, *tiers: ChunkStore, remote: ChunkStore | None = None, cost: LoadingCost | None = None) -> None:
        self.tiers, self.remote, self.cost = tiers, remote, cost or LoadingCost()
        self._all = tiers if remote is None else (*tiers, remote)
        self._reads: list[_Read] = []
        self._vanished: set[str] = set()
        self._lock = threading.Lock()
        self._copying = threading.Lock()
        self._later: Background[str] = Background(self._fetch)
        self._forgettings = self.forgettings()

    def get(self, key: str) -> ChunkKV | None:
        """The chunk, from the nearest tier that has it. Look-ups of one chunk at the same time load it once."""
        while (chunk := self._all[0].get(key)) is None:
            mine = _Read(key)
            mine.busy.acquire()
            try:
                if (other := self._begin(mine)) is None:
                    if (chunk := self._all[0].get(key)) is None:  # another look-up may have just ended
                        chunk = self._read(mine)
                    mine.chunk, mine.over = chunk, True
                    return chunk
            finally:
                with self._lock:
                    self._reads = [read for read in self._reads if read is not mine]
                mine.busy.release()
            if other.busy.acquire(timeout=_PATIENCE):
                other.busy.release()
            else:
                other.hangs = True
            if other.over:  # else it was interrupted, or hangs
                return None if other.deleted else other.chunk
        self._touch(key, 0)
        return chunk

    def _begin(self, mine: _Read) -> _Read | None:
        """Note a look-up, unless another one of the chunk is under way, which is returned then."""
        with self._lock:
            for read in self._reads:
                if read.key == mine.key and not (read.deleted or read.hangs):
                    return read
            self._reads.append(mine)
            return None

    def _read(self, read: _Read) -> ChunkKV | None:
        """The chunk from beyond the nearest tier, copied to those before the one that had it."""
        key, before = read.key, self.forgettings() if self.remote is not None else b""
        for level, tier in enumerate(self._all[1:], start=1):
            with self.cost.loading(self._name(level)) as loaded:
                if (chunk := tier.get(key)) is not None:
                    loaded(chunk.nbytes)
            if chunk is not None:
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
        return None

    def weigh(self, key: str, tokens: int) -> None:
        """Raises `NotWorthLoading` for a chunk of which computing ``tokens`` is quicker than loading it. It is then
        loaded in the background, for those who ask later.
        """
        holder = next((level for level, tier in enumerate(self._all) if key in tier), 0)
        tier = self._all[holder]
        if not holder or not isinstance(tier, (DiskStore, RemoteStore)):
            return
        if (reason := self.cost.why_computed(self._name(holder), tier.size(key), tokens)) is not None:
            self._later.add([key])
            raise NotWorthLoading(reason)

    def _fetch(self, key: str) -> None:
        self.get(key)

    def _name(self, level: int) -> str:
        return DISK if level < len(self.tiers) else REMOTE

    def after_fork(self) -> None:
        """In a forked process, the parent's look-ups are not under way."""
        self._reads = []

    def _touch(self, key: str, level: int) -> None:
        """What memory serves all the time must not be the oldest on a disk."""
        for farther in self._all[level + 1 :]:
            if isinstance(farther, DiskStore):
                farther.touch(key)

    def put(self, key: str, chunk: ChunkKV) -> bool:
        kept = [tier.put(key, chunk) for tier in self._all]
        return any(kept)

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        if not self.tiers[-1].put_spare(key, chunk):  # in memory alone it would be gone with the process
            return False
        for nearer in self.tiers[:-1]:
            nearer.put_spare(key, chunk)
        return True

    def spare_bytes(self) -> int:
        return self.tiers[-1].spare_bytes()

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
