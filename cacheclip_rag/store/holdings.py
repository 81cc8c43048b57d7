"""The contents of a store, on disk or at a remote: listed, verified and forgotten without loading models."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

from ..chunks import Namespace
from ..errors import StoreError
from . import format
from .cap import Found

T = TypeVar("T")

_UNREADABLE = "unreadable"
_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Stored:
    """One chunk's file. ``used``: epoch seconds, to the minute; at a remote, when it was written. ``bytes_per_token``:
    of its KV in memory.
    """

    namespace: str
    key: str
    text: str
    tokens: int
    nbytes: int
    bytes_per_token: int
    used: float
    context: tuple[str, ...] = ()
    tenant: str = ""

    def holds(self, unwanted: Callable[[str], bool]) -> bool:
        """Whether it, or a chunk it was computed with, has such a text."""
        return unwanted(self.text) or any(map(unwanted, self.context))


class Look(NamedTuple):
    """A file, and what it says of itself, or None and the reason."""

    file: Found
    stored: Stored | None
    reason: str = ""
    about: Mapping[str, Any] = MappingProxyType({})
    """Its namespace's fields."""


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


class Holdings(ABC):
    """The chunks at one place, of all models, encoders and tenants.

    Every method raises `StoreError` when the place cannot be reached or changed.
    """

    @abstractmethod
    def scan(self, namespace: str = "") -> Iterable[Found]:
        """The files of the namespaces whose names begin so."""

    @abstractmethod
    def remove(self, file: Found) -> None:
        """That it is gone already is no error."""

    def usage(self, of: Callable[[Stored], bool] | None = None) -> list[NamespaceUsage]:
        """What each namespace holds, the largest first; of such chunks only, where that is asked for."""
        found = {one.name: one for one in self._namespaces()} if of is None else {}
        for file, stored, _, about in self.look(self.scan()):
            if of is not None and (stored is None or file.garbage or not of(stored)):
                continue
            one = found.setdefault(file.namespace, NamespaceUsage(file.namespace))
            if file.garbage:
                one.garbage += 1
                one.garbage_bytes += file.nbytes
                continue
            one.entries += 1
            one.nbytes += file.nbytes
            one.used = max(one.used, file.used)
            if stored is None:
                one.unreadable += 1
            else:
                one.about = one.about or dict(about)
                one.tokens += stored.tokens
                one.bytes_per_token = stored.bytes_per_token
        return sorted(found.values(), key=lambda one: -one.nbytes)

    def entries(self, namespace: str = "") -> Iterator[Stored]:
        """All chunks with a readable header, of the namespaces whose names begin so."""
        for look in self.look(self.scan(namespace)):
            if look.stored is not None and not look.file.garbage:
                yield look.stored

    def keyed(self) -> set[str]:
        """What the namespaces here say of their secrets (`keyed_by`)."""
        first = {file.namespace: file for file in self.scan() if not file.garbage}
        about = [look.about for look in self.look(first.values())] + [one.about for one in self._namespaces()]
        return {str(fields["keyed"]) for fields in about if fields.get("keyed")}

    def verify(self, secret: bytes = b"", progress: Callable[[int], None] | None = None) -> Verified:
        """Read every file and check all that a request would check. Changes nothing."""
        result = Verified()
        for number, file in enumerate(self.scan(), start=1):
            if not file.garbage:
                reason = self._reason(file, secret)
                if reason is None:
                    result.good += 1
                    result.nbytes += file.nbytes
                elif reason == "keyed":
                    result.unproved += 1
                else:
                    result.bad.append((f"{file.namespace}/{file.name}", reason))
            result.open_to_others += self._open_to_others(file)
            if progress is not None:
                progress(number)
        return result

    def forget(self, unwanted: Callable[[str], bool], namespace: str = "", tenant: str | None = None) -> list[Stored]:
        """Remove every chunk with such a text, and every one whose KV was computed behind one, in all
        namespaces whose names begin so, of this tenant where one is named; what was removed.

        Files whose beginning is damaged may hold such a text as well, and so may unfinished ones and those set aside:
        they go. Files of a format to come stay. All files are tried; raises `StoreError` that says what is left, also
        of what cannot be looked into. Repeat it then.
        """
        gone, left = list[Stored](), self._hidden(namespace)
        seen = set[Found]()
        # Another process may be about to store such a chunk. What it stores until it is told is found by the second
        # look, and what it stores later it takes back (see `forgettings`).
        for _ in range(2):
            untold = self._tell()
            for look in self.look([file for file in self.scan(namespace) if file not in seen]):
                seen.add(look.file)
                try:
                    self._forget(look, unwanted, tenant, gone)
                except StoreError as error:
                    left.append(str(error))
        left += untold if gone or left else []
        _complain(left)
        return gone

    def _forget(self, look: Look, unwanted: Callable[[str], bool], tenant: str | None, gone: list[Stored]) -> None:
        file, stored, reason, _ = look
        if stored is not None:
            if tenant in (None, stored.tenant) and stored.holds(unwanted):
                self.remove(file)
                if not file.garbage:
                    gone.append(stored)
        elif reason.startswith(_UNREADABLE):
            raise StoreError(f"{file.namespace}/{file.name} is {reason}")
        elif file.garbage or reason != format.OTHER_FORMAT:
            self.remove(file)

    def look(self, found: Iterable[Found]) -> Iterator[Look]:
        """These files, but for those that are gone meanwhile."""
        return (look for look in self._each(self._look_at, found) if look is not None)

    def clear(self, namespace: str = "") -> int:
        """Remove all chunks of the namespaces whose names begin so; how many. Other files stay.

        All are tried; raises `StoreError` that says what is left.
        """
        count, left = 0, self._hidden(namespace)
        self._tell()
        for file in self.scan(namespace):
            try:
                self.remove(file)
                count += not file.garbage
            except StoreError as error:
                left.append(str(error))
        _complain(left)
        return count

    # ---- a place's own ----------------------------------------------------------------------------------------------

    @abstractmethod
    def _head(self, file: Found, size: int) -> bytes:
        """Its first bytes, or what there is. Raises OSError."""

    @abstractmethod
    def _read(self, file: Found, namespace: Namespace) -> format.Data:
        """All of it, for `format.load`. Raises OSError, and `Rejected` for what is not worth reading."""

    def _each(self, work: Callable[[Found], T], found: Iterable[Found]) -> Iterator[T]:
        """``work`` done on each, in order."""
        return map(work, found)

    def _namespaces(self) -> Iterable[NamespaceUsage]:
        """Those that are known to be there, with what is known about them."""
        return ()

    def _hidden(self, namespace: str) -> list[str]:
        """What may hold chunks of these namespaces and cannot be looked into, each with the reason."""
        return []

    def _tell(self) -> list[str]:
        """Let others know that something is being forgotten; why they cannot be told."""
        return []

    def _open_to_others(self, file: Found) -> list[str]:
        """It, when other users may read or write it."""
        return []

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _look_at(self, file: Found) -> Look | None:
        """None for a file that is gone."""
        try:
            return describe(file, partial(self._head, file))
        except format.Rejected as reason:
            return Look(file, None, str(reason))
        except FileNotFoundError:
            return None
        except OSError as error:
            return Look(file, None, f"{_UNREADABLE}: {error.strerror or error}")

    def _reason(self, file: Found, secret: bytes) -> str | None:
        """Why a file would not be served; "keyed" where only its secret could tell, None where it would be."""
        try:
            metadata: dict[str, str] = format.read_fields(partial(self._head, file))["__metadata__"]
            fields = json.loads(metadata["namespace"])
            keyed = fields.pop("keyed", None) is not None
            namespace = Namespace(fields, secret if keyed else b"")
            if file.name != metadata["key"] + format.SUFFIX:
                return "other key"
            if keyed and namespace.json != metadata["namespace"]:
                return "keyed"
            if file.namespace != namespace.digest[:32]:
                return "other model"
            format.load(self._read(file, namespace), metadata["key"], namespace)
        except format.Rejected as reason:
            return str(reason)
        except (ValueError, AttributeError, TypeError, RecursionError):
            return "damaged header"
        except FileNotFoundError:
            return None
        except (OSError, MemoryError) as error:
            return f"{_UNREADABLE}: {getattr(error, 'strerror', None) or error}"
        return None


def keyed_by(secret: bytes) -> str:
    """What a namespace with this secret says of it."""
    return str(json.loads(Namespace({}, secret).json).get("keyed", ""))


def _complain(left: list[str]) -> None:
    """Raises `StoreError` where anything is left of what was to be removed."""
    if left:
        shown = "; ".join(left[:3]) + ("; ..." if len(left) > 3 else "")
        raise StoreError(
            f"not all could be removed or looked into, {len(left)} are left and may hold what is to be forgotten: "
            f"{shown}. Mend that and forget again"
        )


def describe(file: Found, read: Callable[[int], bytes]) -> Look:
    """What a chunk's file says of itself. ``read(n)`` gives its first n bytes. Raises `Rejected`."""
    found = format.read_fields(read)
    metadata = found["__metadata__"]
    try:
        layers, heads, tokens, dim = map(int, found["keys"]["shape"])
        per_token = 2 * layers * heads * dim * _BYTES.get(found["keys"]["dtype"], 4)
        per_token += 4 * layers * heads * ("int8.value_scales" in found)
        context, about = format.context(metadata), json.loads(metadata["namespace"])
        tenant = str(about.get("tenant", ""))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise format.Rejected("damaged header") from error
    key, text = metadata["key"], metadata["text"]
    stored = Stored(file.namespace, key, text, tokens, file.nbytes, per_token, file.used, context, tenant)
    return Look(file, stored, about=about)


def occurs_in(documents: Iterable[str]) -> Callable[[str], bool]:
    """Whether a chunk's text stands in one of these documents, however either is broken into lines.

    What a framework puts in front of a chunk, lines of ``name: value`` and a blank one, need not stand there.
    """
    whole = [" ".join(document.split()) for document in documents]

    def occurs(text: str) -> bool:
        head, blank, body = text.strip().partition("\n\n")
        labelled = blank and all(": " in line for line in head.splitlines())
        parts = [" ".join(part.split()) for part in ([text, body] if labelled else [text])]
        return any(part in document for part in parts if part for document in whole)

    return occurs
