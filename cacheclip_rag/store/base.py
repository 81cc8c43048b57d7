"""The interface of a chunk store."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from ..chunks import ChunkKV
from ..deprecation import renamed_attribute


@dataclass(frozen=True)
class Entry:
    """A stored chunk as the index knows it, without its KV. ``nbytes`` is what it takes up in the store; ``context``
    and ``in_sequence`` are the `ChunkKV`'s.
    """

    key: str
    text: str
    nbytes: int
    context: tuple[str, ...] = ()
    in_sequence: bool = False

    company = renamed_attribute("company", "context")
    joint = renamed_attribute("joint", "in_sequence")


@dataclass
class StoreStats:
    """Counts since the store was opened; ``entries`` and bytes are what it holds now.

    Of ``entries``, ``fused`` were computed behind other chunks. ``nbytes`` is what all entries take where they are
    kept, copies elsewhere not counted; ``memory_bytes`` and ``disk_bytes`` is what there is in memory and on disk.
    """

    entries: int = 0
    fused: int = 0
    nbytes: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    """Files that were not served, by reason (damaged, foreign, unreadable, ...)."""
    failed_puts: int = 0

    def reject(self, reason: str) -> None:
        self.rejected[reason] = self.rejected.get(reason, 0) + 1


class ChunkStore(Protocol):
    """Chunk KV of one namespace by key (hex digest). Thread-safe. No method raises for a bad entry or a full disk.

    What `get` returned must not be modified: it may be shared by many requests.
    """

    def get(self, key: str) -> ChunkKV | None:
        """The chunk, verified, or None: absent, damaged and foreign entries are all misses."""

    def put(self, key: str, chunk: ChunkKV) -> bool:
        """Keep the chunk; False when it could not be kept. A second put of a key changes nothing."""

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        """As `put`, but only where nothing has to be evicted for it; until it is read it is the first to be evicted."""

    def spare_bytes(self) -> int:
        """How many bytes can be put with nothing evicted."""

    def delete(self, keys: Collection[str]) -> None:
        """Remove entries; absent keys are ignored."""

    def entries(self) -> Iterator[Entry]:
        """What is stored now, in each tier the least recently used first."""

    def refresh(self) -> bool:
        """Take note of what other processes stored or removed; True when something changed."""

    @property
    def changes(self) -> int:
        """How often such a thing was noted, by `refresh` or on the way."""

    def vanished(self) -> list[str]:
        """Keys that other processes removed, as far as it was noted, since this was asked last: by `refresh`, or by a
        look-up that found the file gone.
        """

    def forgettings(self) -> bytes:
        """Another value than before once a process that shares what is kept has forgotten something. What is known
        without being kept here may be what it forgot, and so may what was computed meanwhile.
        """

    def holding(self, keys: Collection[str] = ()) -> AbstractContextManager[None]:
        """For an ingestion: meanwhile this process evicts neither these chunks nor any that is put, to make room for
        others. A put that would need that keeps nothing and returns False. May be nested.
        """

    def room(self) -> int | None:
        """While something is held: how many bytes more can be put. None where anything may be evicted for it."""

    def fitting(self, texts: Sequence[str]) -> int:
        """While something is held: how many chunks with these texts, from the first on, can be expected to be kept, by
        what others take. To be asked before they are encoded; `put` has the last word. All of them otherwise.
        """

    def stats(self) -> StoreStats: ...

    def __contains__(self, key: object) -> bool: ...
