"""A first-come, first-served lock."""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType


class FairLock:
    """A lock that is granted in the order of requests; the engine holds it while the model computes.

    It is held for one prefill or one decoding step, and never across a ``yield``, so that streams interleave, and a
    call made while another one streams does not wait for its end.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[threading.Event] = deque()
        self._busy = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._busy:
                self._busy = True
                return
            mine = threading.Event()
            self._queue.append(mine)
        try:
            mine.wait()
        except BaseException:
            with self._lock:
                if mine in self._queue:
                    self._queue.remove(mine)
                    raise
            self.__exit__(None, None, None)  # granted at the moment of the interrupt: pass it on
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._queue:
                self._queue.popleft().set()
            else:
                self._busy = False

    @property
    def idle(self) -> bool:
        """Whether nobody holds the lock."""
        return not self._busy

    @property
    def waiting(self) -> int:
        """How many callers wait for it."""
        return len(self._queue)
