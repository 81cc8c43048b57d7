"""All the places of one tenant's chunk KV: memory over a folder, over a remote."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..chunks import Namespace
from .admin import Administration, forget_digests
from .base import ChunkStore
from .cap import namespaces
from .disk import DiskStore
from .documents import Documents
from .memory import Memory, MemoryStore
from .remote import Remote, RemoteStore
from .remote_admin import RemoteTexts
from .tiered import TieredStore


class Place:
    """Opens a store for each namespace, and forgets what others hold of a text.

    ``folder`` None keeps everything in memory. ``memory_bytes`` and ``disk_bytes`` cap what all of them keep together,
    the latter in all processes. Thread-safe.
    """

    def __init__(
        self,
        folder: str | Path | None,
        memory_bytes: int,
        disk_bytes: int,
        tenant: str = "",
        secret: bytes = b"",
        remote: Remote | None = None,
    ) -> None:
        self.tenant, self.secret = tenant, secret
        self._folder = None if folder is None else Path(folder).expanduser()
        self._memory, self._disk_bytes = Memory(memory_bytes), disk_bytes
        self.documents = Documents(self._folder, tenant, secret)
        self._remote, self._uploading = remote, list[RemoteStore]()
        self._remote_texts = None if remote is None else RemoteTexts(remote, tenant, self.documents.text)

    def store(self, namespace: Namespace) -> ChunkStore:
        """A new one, of the tiers that there are. Raises `StoreError` when the folder cannot be made."""
        memory = MemoryStore(self._memory)
        if self._folder is None and self._remote is None:
            return memory
        tiers: list[ChunkStore] = [memory]
        if self._folder is not None:
            tiers.append(DiskStore(self._folder, namespace, self._disk_bytes))
        if self._remote is None:
            return TieredStore(*tiers)
        self._uploading.append(RemoteStore(self._remote, namespace))
        return TieredStore(*tiers, remote=self._uploading[-1])

    def usage_file(self, namespace: Namespace) -> Path | None:
        """Where is counted which chunks come together; None where there is no folder."""
        return None if self._folder is None else self._folder / f"usage-{namespace.digest[:32]}.json"

    def forget_elsewhere(self, wanted: Collection[str], opened: Collection[Namespace]) -> None:
        """Drop texts of these digests (see `Documents.text`) from the folder's namespaces that are not ``opened`` here,
        and at the remote from those that are: of what lies there an open store deletes only what it knows.

        Raises `StoreError` when a file cannot be removed; a remote that is away is asked again by `settle`.
        """
        if self._folder is not None:
            done = {namespace.digest[:32] for namespace in opened}
            for path in namespaces(self._folder):
                if path.name not in done:
                    forget_digests(Administration(self._folder), self.documents, wanted, self.tenant, path.name)
        if self._remote_texts is not None:
            self._remote_texts.forget_in([store.namespace.digest[:32] for store in self._uploading], wanted)

    def forget_everywhere(self, wanted: Collection[str]) -> None:
        """Drop texts of these digests from all namespaces, of the folder and of the remote.

        Raises `StoreError` when something cannot be removed, a remote that is away included.
        """
        if self._folder is not None:
            forget_digests(Administration(self._folder), self.documents, wanted, self.tenant)
        if self._remote_texts is not None:
            self._remote_texts.forget(wanted)

    def settle(self) -> None:
        """Upload to the remote, and remove there, what is still to be. Bounded, and never raises."""
        for store in self._uploading:
            store.flush()
        if self._remote_texts is not None:
            self._remote_texts.go_on()
