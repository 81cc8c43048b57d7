"""Drops the KV of deleted chunks after a grace period, unless their text is added again meanwhile."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from ..errors import CacheClipError
from .engines import EngineHandle
from .held_ids import HeldIds, canonical

log = logging.getLogger("cacheclip_rag")


class Forgetting:
    """Drops the KV of texts that no id holds, and of documents that are gone, some ``grace`` seconds after they were
    let go, or when `now` is called.

    Some frameworks change a document by deleting it and adding it again: what was dropped at once would be encoded once
    more.
    """

    def __init__(self, handle: EngineHandle, held: HeldIds, grace: float) -> None:
        self._handle, self._held, self._grace = handle, held, grace
        self._parts: dict[tuple[str | None, str], None] = {}
        self._documents: dict[str, None] = {}
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def later(self, parts: Iterable[tuple[str | None, str]], documents: Iterable[str] = ()) -> None:
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

    def back(self, documents: Iterable[str | None]) -> None:
        """These documents are there again, changed or not."""
        with self._lock:
            for document in documents:
                self._documents.pop(document or "", None)

    def now(self) -> None:
        """Never raises."""
        parts, documents = self._take()
        unused = set(self._held.unused(text for _, text in parts))
        texts = [text for _, text in parts if canonical(text) in unused]
        left = [(d, text) for d, text in parts if d is not None and not self._held.has(d, text)]
        if not (texts or left or documents):
            return
        try:
            engine = self._handle.engine
            for document, text in left:
                engine.documents.discard(document, [text])
            # What another document has, ingested by whatever process, stays.
            engine.forget(engine.documents.unheld(texts))
            if documents:
                engine.forget_document(*documents)
        except Exception:
            log.exception("the KV of deleted chunks was not dropped")

    def at_the_end(self) -> None:
        """As `now`, for the end of a process: a model that is not open is not opened for it."""
        if self._handle.peek() is not None:
            self.now()

    def _noted(self, documents: Iterable[str]) -> list[tuple[str | None, str]]:
        """The documents' texts, as far as an engine is open. Without them only the document could be forgotten, and if
        it comes back changed not even that. Never raises.
        """
        engine = self._handle.peek()
        if engine is None:
            return []
        parts: list[tuple[str | None, str]] = []
        try:
            for document in documents:
                noted = engine.documents.of(document)
                known = engine.index.texts() if noted else []
                parts += [(document, text) for text in known if engine.documents.text(text) in noted]
        except CacheClipError:
            log.exception("the chunks of a deleted document are not known")
        return parts

    def _take(self) -> tuple[list[tuple[str | None, str]], list[str]]:
        with self._lock:
            parts, self._parts = self._parts, {}
            documents, self._documents = self._documents, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return list(parts), list(documents)
