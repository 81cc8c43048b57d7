"""A first-come, first-served limit on the number of requests in flight."""

from __future__ import annotations

import logging
import threading
from collections import deque

log = logging.getLogger("cacheclip_rag")

PATIENCE = 60.0
"""Seconds of waiting after which a warning is logged."""

_LOOK = 0.05  # seconds between two looks at whether a waiting caller has gone


class RequestLimit:
    """A fair semaphore: at most ``limit`` requests are in flight, each with a canvas in memory; others wait in order.

    A request is in flight from before its prefill to the end of its answer. A stream that is neither read to its end
    nor closed stays in flight.
    """

    def __init__(self, limit: int) -> None:
        self._free = self.limit = limit
        # Reentrant: an abandoned stream is released by the garbage collector, which may run on a thread that is inside
        # one of these methods.
        self._lock = threading.RLock()
        self._queue: deque[threading.Lock] = deque()
        """One lock per waiting request, released to admit it; the lock inside an Event is not reentrant."""

    @property
    def in_flight(self) -> int:
        return self.limit - self._free

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def acquire(self, cancel: threading.Event | None = None) -> bool:
        """Wait until the request may start. Returns False, without admitting it, if ``cancel`` is set before."""
        mine = threading.Lock()
        mine.acquire()
        with self._lock:
            if cancel is not None and cancel.is_set():
                return False
            self._queue.append(mine)
            self._admit()
        admitted = False
        try:
            admitted = self._wait(mine, cancel)
        finally:
            if not admitted:
                self._withdraw(mine)
        return admitted

    def release(self) -> None:
        """Mark a request as ended, and admit the next one."""
        with self._lock:
            self._free += 1
            self._admit()

    def _admit(self) -> None:
        """Admit waiting requests, in order, while there is room."""
        while self._free and self._queue:
            self._free -= 1
            try:
                self._queue.popleft().release()
            except IndexError:  # a release by the garbage collector admitted the last one just now
                self._free += 1

    def _wait(self, mine: threading.Lock, cancel: threading.Event | None) -> bool:
        waited = 0.0
        while not mine.acquire(timeout=_LOOK):
            if cancel is not None and cancel.is_set():
                return False
            waited += _LOOK
            if waited >= PATIENCE > waited - _LOOK:
                log.warning("a request waits for one of %d in flight to end; is a stream left open?", self.limit)
        return True

    def _withdraw(self, mine: threading.Lock) -> None:
        """Stop waiting; if the request was admitted at the last moment, release it."""
        with self._lock:
            if mine in self._queue:
                self._queue.remove(mine)
                return
        self.release()
