"""The storage tiers of one tenant's chunk KV: memory, then a folder, then a remote."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Collection
from pathlib import Path

from ..chunks import Namespace
from ..errors import ConfigurationError, StoreError
from . import files
from .admin import Administration, forget_digests
from .base import ChunkStore
from .cap import Held
from .disk import DiskStore
from .documents import Documents
from .forgettings import Forgettings
from .loading_cost import LoadingCost
from .memory import MemoryBudget, MemoryStore
from .remote import Remote, RemoteStore
from .remote_admin import RemoteTexts
from .tiered import TieredStore

log = logging.getLogger("cacheclip_rag")


class Place:
    """Opens a store for each namespace, and forgets what others hold of a text.

    ``folder`` None keeps everything in memory. ``memory_bytes`` and ``disk_bytes`` cap what all of them keep together,
    the latter in all processes. ``cost``: what loading and computing take, measured by all its stores. Thread-safe.
    Raises `ConfigurationError` for a tenant that is no text, a secret that is no bytes, and a cap that is no number.
    """

    def __init__(
        self,
        folder: str | Path | None,
        memory_bytes: int,
        disk_bytes: int,
        tenant: str = "",
        secret: bytes = b"",
        remote: Remote | None = None,
        cost: LoadingCost | None = None,
    ) -> None:
        memory_bytes, disk_bytes = _size("memory_bytes", memory_bytes), _size("disk_bytes", disk_bytes)
        self.tenant, self.secret = tenant, secret
        self._folder = None if folder is None else Path(folder).expanduser()
        self.memory, self._disk_bytes, self._held = MemoryBudget(memory_bytes), disk_bytes, Held()
        """What counts all KV in memory: others that keep some take a `LRUCache` of it."""
        self.documents = Documents(self._folder, tenant, secret)
        self.cost = cost or LoadingCost()
        self._remote, self._uploading = remote, list[RemoteStore]()
        self._stores: weakref.WeakSet[ChunkStore] = weakref.WeakSet()
        self._known = self.forgettings()
        self._again = set[str]()
        """What was forgotten in the folder and may still come there from the remote."""
        self._remote_texts = None if remote is None else RemoteTexts(remote, tenant, self.documents.text)

    def store(self, namespace: Namespace) -> ChunkStore:
        """A new one, of the tiers that there are. Raises `StoreError` when the folder cannot be made."""
        memory = MemoryStore(self.memory)
        if self._folder is None and self._remote is None:
            return self._opened(memory)
        tiers: list[ChunkStore] = [memory]
        if self._folder is not None:
            tiers.append(DiskStore(self._folder, namespace, self._disk_bytes, held=self._held))
        if self._remote is None:
            return self._opened(TieredStore(*tiers, cost=self.cost))
        beside = tiers[-1] if isinstance(tiers[-1], DiskStore) else None
        self._uploading.append(RemoteStore(self._remote, namespace, beside))
        return self._opened(TieredStore(*tiers, remote=self._uploading[-1], cost=self.cost))

    def _opened(self, store: ChunkStore) -> ChunkStore:
        self._stores.add(store)
        return store

    def refresh(self) -> bool:
        """Take note, in all stores that were opened here, of what other processes stored and removed. Whether one of
        them has forgotten something since this was asked last: then all that is known of texts without being kept in
        any store may be of what it forgot.
        """
        forgettings = self.forgettings()
        for store in list(self._stores):
            store.refresh()
        known, self._known = self._known, forgettings
        return forgettings != known

    def forgettings(self) -> bytes:
        """Another value than before once a process has forgotten something in the folder."""
        return b"" if self._folder is None else Forgettings(self._folder).last()

    def usage_file(self, namespace: Namespace) -> Path | None:
        """Where is counted which chunks come together; None where there is no folder."""
        return None if self._folder is None else self._folder / f"usage-{namespace.digest[:32]}.json"

    def forget_elsewhere(self, wanted: Collection[str]) -> None:
        """Drop texts of these digests (see `Documents.text`) from all of the folder's namespaces, those that are open
        included: an open store deletes only what it knows, which neither files that were set aside as damaged are nor
        what another process has stored. At the remote, from the namespaces that are open.

        All is tried; raises `StoreError` that says what is left in the folder. A remote that is away is asked again by
        `settle`.
        """
        try:
            self._forget_in_folder(wanted)
        finally:
            mine = [store.namespace.digest[:32] for store in self._uploading]
            if self._remote_texts is not None and not self._remote_texts.forget_in(mine, wanted):
                self._again |= set(wanted)

    def _forget_in_folder(self, wanted: Collection[str]) -> None:
        if self._folder is None:
            return
        try:
            place = Administration(self._folder)
        except StoreError:
            if not files.is_absent(self._folder):  # as when another process removed all of it
                raise
            return
        forget_digests(place, self.documents, wanted, self.tenant)

    def forget_everywhere(self, wanted: Collection[str]) -> None:
        """Drop texts of these digests from all namespaces, of the folder and of the remote.

        Both are tried; raises `StoreError` that says what is left, a remote that is away included.
        """
        try:
            self._forget_in_folder(wanted)
        finally:
            if self._remote_texts is not None:
                self._remote_texts.forget(wanted)

    def settle(self) -> None:
        """Upload to the remote, and remove there, what is still to be. Bounded, and never raises."""
        for store in self._uploading:
            store.flush()
        if self._remote_texts is not None and self._remote_texts.go_on() and self._again:
            try:  # who asked the remote before it forgot has a copy in the folder again
                self._forget_in_folder(self._again)
                self._again = set()
            except StoreError as error:
                log.warning("what was forgotten may have come back from the remote: %s", error)


def _size(name: str, value: float) -> int:
    """A number of bytes. Raises `ConfigurationError`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigurationError(f"{name} is a number of bytes, as in 8 << 30, not {value!r}")
    return int(value)
