"""Administration of a remote, without loading models: listing, verification, forgetting."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from ..chunks import Namespace
from ..errors import StoreError
from . import files, format
from .cap import Found
from .holdings import Holdings, Look
from .remote import Remote, Unavailable

log = logging.getLogger("cacheclip_rag")

T = TypeVar("T")

_AT_ONCE = 4  # files read at the same time: half of what a remote may be asked at once
_FILE = re.compile(rf"[0-9a-f]{{32}}/([0-9a-f]{{64}}{re.escape(format.SUFFIX)}|{re.escape(files.TEMPORARY)}[^/]*)")


class RemoteAdministration(Holdings):
    """All chunks at a remote. To list it is one call, but what a chunk's text is, is read from its file."""

    def __init__(self, remote: Remote) -> None:
        self.remote = remote

    def scan(self, namespace: str = "") -> list[Found]:
        listed = _asking(self.remote.listing)
        return [
            Found(name[:32], name[33:], nbytes, changed, garbage=files.TEMPORARY in name)
            for name, (nbytes, changed) in sorted(listed.items())
            if _FILE.fullmatch(name) and name.startswith(namespace)
        ]

    def remove(self, file: Found) -> None:
        _asking(lambda: self.remote.remove(_name(file)))

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _head(self, file: Found, size: int) -> bytes:
        return _asking(lambda: self.remote.read_head(_name(file), size))

    def _read(self, file: Found, namespace: Namespace) -> format.Data:
        return self.remote.read(_name(file), lambda read, status: format.check_file(read, status, namespace))

    def _each(self, work: Callable[[Found], T], found: Iterable[Found]) -> Iterator[T]:
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="cacheclip-heads") as pool:
            yield from pool.map(work, found)


class _Order(NamedTuple):
    """What is to be forgotten: digests of texts, in the namespaces of these names, or in all."""

    wanted: frozenset[str]
    namespaces: frozenset[str] | None

    def covers(self, file: Found) -> bool:
        return self.namespaces is None or file.namespace in self.namespaces


class RemoteTexts:
    """Forgets texts at a remote for one tenant, whichever process put them there.

    The beginning of every file is read once, and digests of its texts are remembered, so that forgetting again costs a
    listing and what is new. ``digest`` is that of a chunk's text, as `Documents.text` makes it. Thread-safe.
    """

    def __init__(self, remote: Remote, tenant: str, digest: Callable[[str], str]) -> None:
        self._place, self._tenant, self._digest = RemoteAdministration(remote), tenant, digest
        self._texts: dict[str, frozenset[str]] = {}
        self._foreign: set[str] = set()
        self._orders: list[_Order] = []
        self._lock = threading.Lock()

    def forget(self, wanted: Collection[str]) -> None:
        """Remove every chunk with a text of these digests, and every one that was computed behind one.

        Files whose beginning is damaged go as well. Raises `StoreError` when the remote is away; it is tried again by
        the next call, and by `go_on`.
        """
        with self._lock:
            self._orders.append(_Order(frozenset(wanted), None))
            self._carry_out()

    def forget_in(self, namespaces: Collection[str], wanted: Collection[str]) -> bool:
        """As `forget`, in namespaces of these names; a remote that is away is worth a warning. Returns what `go_on`
        does.
        """
        with self._lock:
            self._orders.append(_Order(frozenset(wanted), frozenset(namespaces)))
        return self.go_on()

    def go_on(self) -> bool:
        """Forget what could not be forgotten when that was asked for. Whether nothing of it is left; warns when the
        remote is still away.
        """
        with self._lock:
            try:
                if self._orders:
                    self._carry_out()
            except StoreError as error:
                log.warning("what was forgotten may still be at the remote: %s", error)
            return not self._orders

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _carry_out(self) -> None:
        found = {_name(file): file for file in self._place.scan()}
        self._texts = {name: texts for name, texts in self._texts.items() if name in found}
        self._learn([file for file in found.values() if any(order.covers(file) for order in self._orders)])
        failures = list[StoreError]()
        for name, texts in list(self._texts.items()):
            if any(order.wanted & texts and order.covers(found[name]) for order in self._orders):
                try:
                    self._place.remove(found[name])
                    del self._texts[name]
                except StoreError as error:
                    failures.append(error)
        if failures:
            raise StoreError(f"{len(failures)} files could not be removed from the remote: {failures[0]}")
        self._orders.clear()

    def _learn(self, found: Iterable[Found]) -> None:
        new = [file for file in found if _name(file) not in self._texts]
        # One file says whose all of its namespace are: those of other tenants need not be read.
        first = {file.namespace: file for file in new}
        for some in (first.values(), [file for file in new if file is not first[file.namespace]]):
            for look in self._place.look(file for file in some if file.namespace not in self._foreign):
                self._note(look)

    def _note(self, look: Look) -> None:
        if look.stored is None:
            if look.reason != format.OTHER_FORMAT:
                self._place.remove(look.file)
        elif look.stored.tenant != self._tenant:
            self._foreign.add(look.file.namespace)
        else:
            self._texts[_name(look.file)] = frozenset(map(self._digest, (look.stored.text, *look.stored.context)))


def _name(file: Found) -> str:
    return f"{file.namespace}/{file.name}"


def _asking(work: Callable[[], T]) -> T:
    """Raises FileNotFoundError, and `StoreError` for a remote that is away."""
    try:
        return work()
    except Unavailable as error:
        raise StoreError(str(error)) from error
