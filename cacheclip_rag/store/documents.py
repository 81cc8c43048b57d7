"""Which chunks belong to which document, so that deleting a document finds them, even after a restart.

One empty file a pair, ``STORE/documents/<document digest>-<text digest>``: nothing in it can be damaged or half
written, processes that write at the same time cannot undo each other's work, and neither the document's name nor its
text is in it. These files are the truth; chunk files, which may serve several documents, do not say whose they are.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from ..chunks import Namespace
from ..errors import ConfigurationError, StoreError
from . import files

FOLDER = "documents"
_PAIR = re.compile(r"([0-9a-f]{64})-([0-9a-f]{64})")

Pair = tuple[str, str]
"""Digests of a document's name and of a chunk's text."""


class Documents:
    """The documents of one tenant, below a store's ``folder``, or in memory where that is None. Thread-safe.

    With a ``secret`` the digests are keyed: who does not know it cannot tell whether a document or text is there.

    Raises `ConfigurationError` for a tenant or a document's name that is no text, and a secret that is no bytes: what
    is noted under 7 would not be found under "7".
    """

    def __init__(self, folder: str | Path | None, tenant: str = "", secret: bytes = b"") -> None:
        self.path = None if folder is None else Path(folder).expanduser() / FOLDER
        if not isinstance(tenant, str):
            raise ConfigurationError(f'a tenant is a text, "" where there is none, not {tenant!r}')
        if not isinstance(secret, bytes):
            raise ConfigurationError(f"a secret is bytes, not {type(secret).__name__}")
        self._names = Namespace({"documents of": tenant}, secret)
        self._memory: set[Pair] = set()
        self._lock = threading.Lock()

    def text(self, text: str) -> str:
        """The digest of a chunk's text, the same whichever model its KV is of."""
        return self._names.key(text)

    def add(self, document: str, texts: Iterable[str]) -> None:
        """These chunks are the document's, beside those it has. As `note`."""
        self.note((document, text) for text in texts)

    def note(self, chunks: Iterable[tuple[str, str]]) -> None:
        """``(document, text)`` of chunks, beside what is known of the documents. Call it before they are stored.

        In a folder that may only be read, where no chunk is stored either, it is noted in memory. Raises `StoreError`
        when it cannot be noted otherwise: a chunk must not be stored that its document's deletion would miss.
        """
        pairs = {(self._document(document), self.text(text)) for document, text in chunks}
        try:
            if self.path is not None:
                files.make_directory(self.path.parent)
                files.make_directory(self.path)
                files.mark(self.path, [_name(pair) for pair in sorted(pairs)])
                return
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise StoreError(f"a document's chunks cannot be noted in {self.path}: {error.strerror}") from error
        with self._lock:
            self._memory |= pairs

    def only(self, documents: Collection[str]) -> frozenset[str]:
        """Digests of the texts that these documents have and no other one."""
        mine = self._documents(documents)
        pairs = self._pairs()
        others = {text for document, text in pairs if document not in mine}
        return frozenset(text for document, text in pairs if document in mine) - others

    def of(self, document: str) -> frozenset[str]:
        """Digests of the document's texts."""
        wanted = self._document(document)
        return frozenset(text for document, text in self._pairs() if document == wanted)

    def discard(self, document: str, texts: Iterable[str]) -> None:
        """As `release`, by the texts themselves."""
        self.release(document, set(map(self.text, texts)))

    def release(self, document: str, digests: Collection[str]) -> None:
        """The texts of these digests are the document's no longer. Raises `StoreError`."""
        self._remove({(self._document(document), digest) for digest in digests})

    def remove(self, documents: Collection[str]) -> None:
        """Drop all that is known of these documents. Raises `StoreError`."""
        mine = self._documents(documents)
        self._remove({pair for pair in self._pairs() if pair[0] in mine})

    def clear(self) -> None:
        """Drop what is known of all documents, of all tenants. Raises `StoreError`."""
        self._remove(self._pairs())

    def unheld(self, texts: Iterable[str]) -> list[str]:
        """Those of these texts that no document has."""
        held = {text for _, text in self._pairs()}
        return [text for text in texts if self.text(text) not in held]

    def drop(self, texts: Iterable[str]) -> None:
        """No document has these texts any longer. Raises `StoreError`."""
        gone = set(map(self.text, texts))
        self._remove({pair for pair in self._pairs() if pair[1] in gone})

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _document(self, name: str) -> str:
        if not isinstance(name, str):
            raise ConfigurationError(f"a document's name is a text, not {name!r}")
        return self._names.key("", (name,))

    def _documents(self, names: Collection[str]) -> set[str]:
        if isinstance(names, str):  # whose characters would be taken for names
            raise ConfigurationError("documents are given as several names, not as one: [name]")
        return set(map(self._document, names))

    def _pairs(self) -> set[Pair]:
        with self._lock:
            pairs = set(self._memory)
        if self.path is not None:
            try:
                found = [_PAIR.fullmatch(entry.name) for entry in files.listing(self.path)]
            except FileNotFoundError:
                found = []
            except OSError as error:
                raise StoreError(f"{self.path} cannot be read: {error.strerror}") from error
            pairs |= {(match[1], match[2]) for match in found if match is not None}
        return pairs

    def _remove(self, pairs: set[Pair]) -> None:
        with self._lock:
            self._memory -= pairs
        if self.path is None or not pairs:
            return
        failures = list[OSError]()
        for pair in pairs:
            try:
                files.remove(self.path / _name(pair))
            except OSError as error:
                failures.append(error)
        try:
            files.sync_folder(self.path)  # or a power cut brings them back
        except FileNotFoundError:
            pass
        except OSError as error:
            failures.append(error)
        if failures:
            raise StoreError(f"{self.path} cannot be changed: {failures[0].strerror or failures[0]}") from failures[0]


def _name(pair: Pair) -> str:
    return "-".join(pair)
