"""Looking after a store's folder from outside, without its models: what is in it, whether it is whole, clearing up."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..chunks import Namespace
from ..errors import StoreError
from . import files, format
from .cap import STALE, Found, SharedCap, namespaces
from .documents import FOLDER, Documents

_HEAD = 64 << 10
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Stored:
    """One chunk's file. ``used``: epoch seconds, to the minute. ``bytes_per_token``: of its KV in memory."""

    namespace: str
    key: str
    text: str
    tokens: int
    nbytes: int
    bytes_per_token: int
    used: float
    company: tuple[str, ...] = ()
    tenant: str = ""

    def holds(self, unwanted: Callable[[str], bool]) -> bool:
        """Whether it, or a chunk it was computed with, has such a text."""
        return unwanted(self.text) or any(map(unwanted, self.company))


@dataclass
class NamespaceUsage:
    """One model, encoder and tenant. ``about``: the namespace's fields, empty where nothing says."""

    name: str
    about: dict[str, Any] = field(default_factory=dict)
    entries: int = 0
    nbytes: int = 0
    tokens: int = 0
    bytes_per_token: int = 0
    used: float = 0.0
    unreadable: int = 0
    garbage: int = 0
    """Files that were set aside as damaged or left by a crash, and so are their bytes."""
    garbage_bytes: int = 0


@dataclass
class Verified:
    """Every file, read whole. ``bad``: ``(file, reason)``; ``unproved``: keyed files, for want of the secret."""

    good: int = 0
    nbytes: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    unproved: int = 0
    open_to_others: list[str] = field(default_factory=list)
    """Folders and files that other users may read or write."""


class Administration:
    """A store's folder. Raises `StoreError` when it is none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        try:
            files.changed(self.folder)
            list(files.listing(self.folder))
        except OSError as error:
            raise StoreError(f"{folder} is no chunk store: {error.strerror}") from error

    def usage(self) -> list[NamespaceUsage]:
        """What each namespace holds, the largest first."""
        found = {path.name: NamespaceUsage(path.name, self._about(path)) for path in namespaces(self.folder)}
        for file in self._scan():
            one = found.setdefault(file.path.parent.name, NamespaceUsage(file.path.parent.name))
            if file.garbage:
                one.garbage += 1
                one.garbage_bytes += file.nbytes
                continue
            one.entries += 1
            one.nbytes += file.nbytes
            one.used = max(one.used, file.used)
            stored = self._stored(file)
            if stored is None:
                one.unreadable += 1
            else:
                one.tokens += stored.tokens
                one.bytes_per_token = stored.bytes_per_token
        return sorted(found.values(), key=lambda one: -one.nbytes)

    def entries(self, namespace: str = "") -> Iterator[Stored]:
        """All chunks with a readable header, of the namespaces whose names begin so."""
        for file in self._scan(namespace):
            if not file.garbage and (stored := self._stored(file)) is not None:
                yield stored

    def verify(self, secret: bytes = b"", progress: Callable[[int], None] | None = None) -> Verified:
        """Read every file and check all that a request would check. Changes nothing."""
        result = Verified()
        for number, file in enumerate(self._scan(), start=1):
            if not file.garbage:
                reason = self._reason(file, secret)
                if reason is None:
                    result.good += 1
                    result.nbytes += file.nbytes
                elif reason == "keyed":
                    result.unproved += 1
                else:
                    result.bad.append((f"{file.path.parent.name}/{file.path.name}", reason))
            self._check_mode(file.path, result)
            if progress is not None:
                progress(number)
        for path in (self.folder, self.folder / FOLDER, *namespaces(self.folder)):
            self._check_mode(path, result)
        return result

    def collect(self, cap: int | None = None, unused_for: float | None = None) -> list[Found]:
        """Remove what crashes left an hour ago, damaged files, and empty namespaces; what was removed.

        ``unused_for``: also chunks that were not used for so many seconds. ``cap``: also the least recently used
        chunks until no more than so many bytes are left. Raises `StoreError` when the store is busy.
        """
        now = time.time()
        gone = [
            file
            for file in self._scan()
            if (
                now - file.used > STALE or file.path.suffix == ".bad"
                if file.garbage
                else unused_for is not None and now - file.used > unused_for
            )
            and self._remove(file.path)
        ]
        if cap is not None:
            excess = sum(file.nbytes for file in self._scan()) - cap
            try:
                gone += SharedCap(self.folder, cap).free(excess, lambda file: file.used) if excess > 0 else []
            except TimeoutError as error:
                raise StoreError(f"another process keeps {self.folder} busy") from error
        self._remove_empty()
        return gone

    def forget(self, unwanted: Callable[[str], bool], namespace: str = "", tenant: str | None = None) -> list[Stored]:
        """Remove every chunk with such a text, and every one whose KV was computed in the company of one, in all
        namespaces whose names begin so, of this tenant where one is named; what was removed.

        Files that cannot be read may hold such a text as well: those set aside as damaged go, and so do unfinished
        ones that say so, or whose beginning does not say what they are.
        """
        gone = []
        for file in self._scan(namespace):
            stored = self._stored(file)
            if stored is None:
                if file.garbage:
                    self._remove(file.path)
            elif (
                tenant in (None, stored.tenant)
                and stored.holds(unwanted)
                and self._remove(file.path)
                and not file.garbage
            ):
                gone.append(stored)
        return gone

    def forget_documents(
        self, documents: Sequence[str], tenant: str = "", secret: bytes = b""
    ) -> tuple[list[Stored], int]:
        """Remove what only these documents of the tenant have; what was removed, and how much of it is left."""
        known = Documents(self.folder, tenant, secret)
        wanted = known.only(documents)

        def unwanted(text: str) -> bool:
            return known.text(text) in wanted

        gone = self.forget(unwanted, tenant=tenant) if wanted else []
        left = sum(one.tenant == tenant and one.holds(unwanted) for one in self.entries()) if wanted else 0
        known.remove(documents)
        return gone, left

    def clear(self, namespace: str = "") -> int:
        """Remove all chunks of the namespaces whose names begin so; how many. Other files in the folder stay, but for
        the notes of which document has which chunks, which go when no namespace is named.
        """
        count = 0
        for file in self._scan(namespace):
            count += self._remove(file.path) and not file.garbage
        if not namespace:
            Documents(self.folder).clear()
        self._remove_empty()
        return count

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _scan(self, namespace: str = "") -> list[Found]:
        scan = SharedCap(self.folder, 0).scan()
        return sorted((f for f in scan if f.path.parent.name.startswith(namespace)), key=lambda file: file.path)

    @staticmethod
    def _head(path: Path) -> dict[str, Any]:
        head = files.read_head(path, _HEAD)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 + length <= 8 + format.MAX_HEADER:
            head = files.read_head(path, 8 + length)
        return format.fields(head)

    def _stored(self, file: Found) -> Stored | None:
        try:
            head = self._head(file.path)
            layers, heads, tokens, dim = map(int, head["keys"]["shape"])
            per_token = 2 * layers * heads * dim * _BYTES.get(head["keys"]["dtype"], 4)
            per_token += 4 * layers * heads * ("int8.value_scales" in head)
            metadata = head["__metadata__"]
            company, tenant = format.company(metadata), str(json.loads(metadata["namespace"]).get("tenant", ""))
        except (OSError, format.Rejected, KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        name, key, text = file.path.parent.name, metadata["key"], metadata["text"]
        return Stored(name, key, text, tokens, file.nbytes, per_token, file.used, company, tenant)

    @staticmethod
    def _reason(file: Found, secret: bytes) -> str | None:
        """Why a file would not be served; "keyed" where only its secret could tell, None where it would be."""
        try:
            data = files.read(file.path)
            metadata = format.header(data)
            fields = json.loads(metadata["namespace"])
            keyed = fields.pop("keyed", None) is not None
            namespace = Namespace(fields, secret if keyed else b"")
            if file.path.name != metadata["key"] + format.SUFFIX:
                return "other key"
            if keyed and namespace.json != metadata["namespace"]:
                return "keyed"
            if file.path.parent.name != namespace.digest[:32]:
                return "other model"
            format.load(data, metadata["key"], namespace)
        except format.Rejected as reason:
            return str(reason)
        except (ValueError, AttributeError, TypeError, RecursionError):
            return "damaged header"
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as error:
            return f"unreadable: {getattr(error, 'strerror', None) or error}"
        return None

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        try:
            about = json.loads(bytes(files.read(path / "namespace.json", format.MAX_HEADER)))
        except (OSError, ValueError, RecursionError):
            return {}
        return about if isinstance(about, dict) else {}

    @staticmethod
    def _check_mode(path: Path, result: Verified) -> None:
        try:
            mode = stat.S_IMODE(files.status(path).st_mode)
        except OSError:
            return
        if mode & 0o077:
            result.open_to_others.append(f"{path} ({mode:o})")

    @staticmethod
    def _remove(path: Path) -> bool:
        try:
            files.remove(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be removed: {error.strerror}") from error
        return True

    def _remove_empty(self) -> None:
        for path in namespaces(self.folder):
            try:
                if [entry.name for entry in files.listing(path)] in (["namespace.json"], []):
                    files.remove(path / "namespace.json")
                    files.remove_directory(path)
            except OSError:
                continue


def occurs_in(documents: Iterable[str]) -> Callable[[str], bool]:
    """Whether a chunk's text stands in one of these documents, however either is broken into lines."""
    whole = [" ".join(document.split()) for document in documents]
    return lambda text: bool(wanted := " ".join(text.split())) and any(wanted in document for document in whole)
