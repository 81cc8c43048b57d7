"""KV that nobody needs any more is dropped, but not before it is clear that nobody does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from cacheclip_rag.errors import CacheClipError
from cacheclip_rag.frameworks import EngineHandle, Holdings

log = logging.getLogger("cacheclip_rag")


class Forgetting:
    """Drops the KV of texts that no id holds, and of documents that are gone, some ``grace`` seconds after they were
    let go, or when `now` is called.

    A document is changed by deleting it and adding it again: what was dropped at once would be encoded once more.
    """

    def __init__(self, handle: EngineHandle, held: Holdings, grace: float) -> None:
        self._handle, self._held, self._grace = handle, held, grace
        self._texts: dict[tuple[str | None, str], None] = {}
        self._documents: dict[str, None] = {}
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def later(self, texts: Iterable[tuple[str | None, str]], document: str | None = None) -> None:
        """``texts``: with the document each was of, where that is known. ``document``: all of it is gone, which an
        earlier process may have ingested.
        """
        texts = [*texts, *self._noted(document)]
        with self._lock:
            self._texts.update(dict.fromkeys(texts))
            if document is not None:
                self._documents[document] = None
            if (self._texts or self._documents) and self._timer is None and self._grace:
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
        texts, documents = self._take()
        unused = set(self._held.unused(text for _, text in texts))
        texts = [(document, text) for document, text in texts if text.strip() in unused]
        if not (texts or documents):
            return
        try:
            engine = self._handle.engine
            for document, text in texts:
                if document is not None:
                    engine.documents.discard(document, [text])
            # What another document has, ingested by whatever process, stays.
            engine.forget(engine.documents.unheld(text for _, text in texts))
            if documents:
                engine.forget_document(*documents)
        except Exception:
            log.exception("the KV of deleted chunks was not dropped")

    def at_the_end(self) -> None:
        """As `now`, for the end of a process: a model that is not open is not opened for it."""
        if self._handle.peek() is not None:
            self.now()

    def _noted(self, document: str | None) -> list[tuple[str | None, str]]:
        """The document's texts, as far as an engine is open. Without them only the document could be forgotten, and if
        it comes back changed not even that. Never raises.
        """
        engine = self._handle.peek()
        if document is None or engine is None:
            return []
        try:
            noted = engine.documents.of(document)
        except CacheClipError:
            log.exception("the chunks of a deleted document are not known")
            return []
        known = engine.index.texts() if noted else []
        return [(document, text) for text in known if engine.documents.text(text) in noted]

    def _take(self) -> tuple[list[tuple[str | None, str]], list[str]]:
        with self._lock:
            texts, self._texts = self._texts, {}
            documents, self._documents = self._documents, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return list(texts), list(documents)
