"""Drops the KV of deleted chunks after a grace period, unless their text is added again meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from ..errors import CacheClipError
from .chunk_kv import Handle, Part
from .held_ids import HeldIds, canonical

log = logging.getLogger("cacheclip_rag")


class Forgetting:
    """Drops the KV of texts that no id holds, and of documents that are gone, some ``grace`` seconds after they were
    let go, or when `now` is called.

    Some frameworks change a document by deleting it and adding it again: what was dropped at once would be encoded once
    more.
    """

    def __init__(self, handle: Handle, held: HeldIds, grace: float) -> None:
        self._handle, self._held, self._grace = handle, held, grace
        self._parts: dict[Part, None] = {}
        self._documents: dict[str, None] = {}
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def later(self, parts: Iterable[Part], documents: Iterable[str] = ()) -> None:
        """``parts``: texts, with the document each was of, where that is known. ``documents``: all of each is gone,
        which an earlier process may have ingested.
        """
        documents = list(documents)
        parts = [*parts, *self._noted(documents if self._grace else ())]
        with self._lock:
            self._parts.update(dict.fromkeys(parts))
            self._documents.update(dict.fromkeys(documents))
            if (self._parts or self._documents) and self._timer is None and self._grace:
                self._timer = threading.Timer(self._grace, self.now)
                self._timer.daemon = True
                self._timer.start()
        if not self._grace:
            self.now()

    def back(self, documents: Iterable[str | None]) -> list[str]:
        """These documents are there again, changed or not. Those of them that were to be forgotten."""
        with self._lock:
            back = [document for document in documents if document and document in self._documents]
            for document in back:
                del self._documents[document]
        return back

    def now(self) -> None:
        """Never raises."""
        parts, documents = self._take()
        unused = set(self._held.unused(text for _, text in parts))
        texts = [text for _, text in parts if canonical(text) in unused]
        left: list[Part] = [(d, text) for d, text in parts if d is not None and not self._held.has(d, text)]
        if not (texts or left or documents):
            return
        try:
            self._handle.kv.forget(left, texts, documents)
        except Exception:
            log.exception("the KV of deleted chunks was not dropped")

    def at_the_end(self) -> None:
        """As `now`, for the end of a process: a model that is not open is not opened for it."""
        if self._handle.peek_kv() is not None:
            self.now()

    def _noted(self, documents: Iterable[str]) -> list[Part]:
        """The documents' texts, as far as an engine is open. Without them only the document could be forgotten, and if
        it comes back changed not even that. Never raises.
        """
        kv = self._handle.peek_kv()
        try:
            return [] if kv is None else kv.noted(documents)
        except CacheClipError:
            log.exception("the chunks of a deleted document are not known")
            return []

    def _take(self) -> tuple[list[Part], list[str]]:
        with self._lock:
            parts, self._parts = self._parts, {}
            documents, self._documents = self._documents, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return list(parts), list(documents)
