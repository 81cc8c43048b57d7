"""Administration of a store's folder, without loading models: statistics, verification, clean-up, forgetting."""

from __future__ import annotations

import json
import logging
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..chunks import Namespace
from ..errors import StoreError
from . import files, format
from .cap import STALE, Found, SharedCap, hidden, namespaces
from .documents import FOLDER, Documents
from .forgettings import Forgettings
from .holdings import Holdings, NamespaceUsage, Stored, Verified

log = logging.getLogger("cacheclip_rag")


class Administration(Holdings):
    """A store's folder. Raises `StoreError` when it is none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            files.changed(self.folder)
            list(files.listing(self.folder))
        except OSError as error:
            raise StoreError(f"{folder} is no chunk store: {error.strerror}") from error

    def scan(self, namespace: str = "") -> list[Found]:
        scan = SharedCap(self.folder, 0).scan()
        return sorted(file for file in scan if file.namespace.startswith(namespace))

    def remove(self, file: Found) -> None:
        try:
            files.remove(self._path(file))
        except OSError as error:
            raise StoreError(f"{self._path(file)} cannot be removed: {error.strerror}") from error

    def verify(self, secret: bytes = b"", progress: Callable[[int], None] | None = None) -> Verified:
        """Read every file and check all that a request would check, and who may. Changes nothing."""
        result = super().verify(secret, progress)
        for path in (self.folder, self.folder / FOLDER, *namespaces(self.folder)):
            result.open_to_others += _open_to_others(path)
        return result

    def usage_of_documents(
        self, documents: Sequence[str], tenant: str = "", secret: bytes = b""
    ) -> list[NamespaceUsage]:
        """What these documents of the tenant take up in each namespace; a chunk that several have counts once."""
        known = Documents(self.folder, tenant, secret)
        texts = frozenset[str]().union(*map(known.of, documents))
        return self.usage(lambda stored: stored.tenant == tenant and known.text(stored.text) in texts)

    def knows_documents(self, documents: Sequence[str], tenant: str = "", secret: bytes = b"") -> bool:
        """Whether any of these documents of the tenant has chunks."""
        known = Documents(self.folder, tenant, secret)
        return any(map(known.of, documents))

    def collect(self, cap: int | None = None, unused_for: float | None = None) -> list[Found]:
        """Remove what crashes left an hour ago, damaged files, and empty namespaces; what was removed.

        ``unused_for``: also chunks that were not used for so many seconds. ``cap``: also the least recently used
        chunks until no more than so many bytes are left. Raises `StoreError` when the store is busy.
        """
        now = time.time()
        gone = []
        for file in self.scan():
            idle = now - file.used
            if (
                idle > STALE or file.name.endswith(".bad")
                if file.garbage
                else unused_for is not None and idle > unused_for
            ):
                self.remove(file)
                gone.append(file)
        if cap is not None:
            excess = sum(file.nbytes for file in self.scan()) - cap
            try:
                gone += SharedCap(self.folder, cap).free(excess, lambda file: file.used) if excess > 0 else []
            except TimeoutError as error:
                raise StoreError(f"another process keeps {self.folder} busy") from error
        self._remove_empty()
        return gone

    def forget(self, unwanted: Callable[[str], bool], namespace: str = "", tenant: str | None = None) -> list[Stored]:
        try:
            return super().forget(unwanted, namespace, tenant)
        finally:
            self._sync()

    def forget_documents(
        self,
        documents: Sequence[str],
        tenant: str = "",
        secret: bytes = b"",
        elsewhere: Sequence[Holdings] = (),
    ) -> tuple[list[Stored], int]:
        """Remove what only these documents of the tenant have, here and ``elsewhere``; what was removed, and how much
        of it is left. Interrupted, it can be repeated: what is known of the documents goes last.
        """
        known = Documents(self.folder, tenant, secret)
        wanted = known.only(documents)
        gone, left, failures = list[Stored](), 0, list[str]()
        for place in (self, *elsewhere) if wanted else ():
            try:
                gone += forget_digests(place, known, wanted, tenant)
                left += sum(
                    one.tenant == tenant and one.holds(lambda text: known.text(text) in wanted)
                    for one in place.entries()
                )
            except StoreError as error:
                failures.append(str(error))
        if failures:
            raise StoreError("; ".join(failures))
        if not left:
            known.remove(documents)
        return gone, left

    def clear(self, namespace: str = "") -> int:
        """Remove all chunks of the namespaces whose names begin so; how many. Other files in the folder stay, but for
        the notes of which document has which chunks, which go when no namespace is named.
        """
        count = super().clear(namespace)
        if not namespace:
            Documents(self.folder).clear()
        self._remove_empty()
        self._sync()
        return count

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _hidden(self, namespace: str) -> list[str]:
        try:
            return hidden(self.folder, namespace)
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be read: {error.strerror or error}") from error

    def _tell(self) -> list[str]:
        try:
            Forgettings(self.folder).note()
            return []
        except OSError as error:
            return [f"other processes cannot be told, since {self.folder} cannot be written: {error.strerror or error}"]

    def _head(self, file: Found, size: int) -> bytes:
        return files.read_head(self._path(file), size)

    def _read(self, file: Found, namespace: Namespace) -> format.Data:
        return files.read(self._path(file), check=lambda read, status: format.check_file(read, status, namespace))

    def _namespaces(self) -> Iterator[NamespaceUsage]:
        return (NamespaceUsage(path.name, _about(path)) for path in namespaces(self.folder))

    def _open_to_others(self, file: Found) -> list[str]:
        return _open_to_others(self._path(file))

    def _path(self, file: Found) -> Path:
        return self.folder / file.namespace / file.name

    def _sync(self) -> None:
        """What was removed does not come back with a power cut."""
        for path in (self.folder, *namespaces(self.folder)):
            try:
                files.sync_folder(path)
            except OSError as error:
                log.warning("what was removed from %s may come back with a power cut: %s", path, error)

    def _remove_empty(self) -> None:
        for path in namespaces(self.folder):
            try:
                if [entry.name for entry in files.listing(path)] in (["namespace.json"], []):
                    files.remove(path / "namespace.json")
                    files.remove_directory(path)
            except OSError:
                continue


def forget_digests(
    place: Holdings, documents: Documents, wanted: Collection[str], tenant: str, namespace: str = ""
) -> list[Stored]:
    """Remove the tenant's chunks with texts of these digests, as ``documents`` has them, of all namespaces whose names
    begin so; what was removed.
    """
    return place.forget(lambda text: documents.text(text) in wanted, namespace, tenant)


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(bytes(files.read(path / "namespace.json", format.MAX_HEADER)))
    except (OSError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _open_to_others(path: Path) -> list[str]:
    try:
        mode = stat.S_IMODE(files.status(path).st_mode)
    except OSError:
        return []
    return [f"{path} ({mode:o})"] if mode & 0o077 else []
