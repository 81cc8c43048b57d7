"""KV that nobody needs any more is dropped, but not before it is clear that nobody does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from cacheclip_rag.integration import EngineHandle, Holdings

log = logging.getLogger("cacheclip_rag")


class Forgetting:
    """Drops the KV of texts that no id holds, some ``grace`` seconds after they were let go, or when `now` is called.

    A document is changed by deleting it and adding it again: what was dropped at once would be encoded once more.
    """

    def __init__(self, handle: EngineHandle, held: Holdings, grace: float) -> None:
        self._handle, self._held, self._grace = handle, held, grace
        self._waiting: dict[str, None] = {}
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()

    def later(self, texts: Iterable[str]) -> None:
        with self._lock:
            self._waiting.update(dict.fromkeys(texts))
            if self._waiting and self._timer is None and self._grace:
                self._timer = threading.Timer(self._grace, self.now)
                self._timer.daemon = True
                self._timer.start()
        if not self._grace:
            self.now()

    def now(self) -> None:
        """Never raises."""
        unused = self._take()
        if unused:
            try:
                self._handle.engine.forget(unused)
            except Exception:
                log.exception("the KV of deleted chunks was not dropped")

    def at_the_end(self) -> None:
        """As `now`, for the end of a process: a model that is not open is not opened for it."""
        if self._handle.peek() is not None:
            self.now()

    def _take(self) -> list[str]:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        return self._held.unused(waiting)
