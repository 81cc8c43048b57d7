"""How many requests may be in flight at a time: whoever asked first goes first."""

from __future__ import annotations

import logging
import threading
from collections import deque

log = logging.getLogger("cacheclip_rag")

PATIENCE = 60.0
"""Seconds of waiting after which the log says so."""

_LOOK = 0.05  # seconds between two looks at whether a waiting caller has gone


class RequestLimit:
    """How many requests may be in flight, each with a canvas in memory; the others wait, in the order of asking.

    A seat is held from before the prefill to the end of the answer, so a stream that is neither read to its end nor
    closed keeps one.
    """

    def __init__(self, limit: int) -> None:
        self._free = self.limit = limit
        # Reentrant: a stream that nobody holds any more gives its seat back from the garbage collector, which may run
        # on a thread that is inside one of these methods.
        self._lock = threading.RLock()
        self._queue: deque[threading.Lock] = deque()
        """Locks that are released when it is their owner's turn; an Event has a lock inside that is not reentrant."""

    @property
    def in_flight(self) -> int:
        return self.limit - self._free

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def acquire(self, cancel: threading.Event | None = None) -> bool:
        """Wait for a seat. False, and no seat, if ``cancel`` is set before there is one."""
        mine = threading.Lock()
        mine.acquire()
        with self._lock:
            if cancel is not None and cancel.is_set():
                return False
            self._queue.append(mine)
            self._call()
        seated = False
        try:
            seated = self._wait(mine, cancel)
        finally:
            if not seated:
                self._leave(mine)
        return seated

    def release(self) -> None:
        with self._lock:
            self._free += 1
            self._call()

    def _call(self) -> None:
        """Free seats go to those who wait."""
        while self._free and self._queue:
            self._free -= 1
            try:
                self._queue.popleft().release()
            except IndexError:  # the collector ran just now, and what it ended has called the last one
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

    def _leave(self, mine: threading.Lock) -> None:
        """Give up waiting; a seat that came at the last moment goes to the next."""
        with self._lock:
            if mine in self._queue:
                self._queue.remove(mine)
                return
        self.release()
