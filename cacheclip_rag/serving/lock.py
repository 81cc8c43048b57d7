"""A first-come, first-served lock on the model."""

from __future__ import annotations

import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Protocol

from ..errors import ConfigurationError
from ..interrupts import Gate, raised_by_signal

_LOOK = 0.1
"""Seconds between two checks of a waiting thread whether the holder is gone."""


class Awaited(Protocol):
    """What a caller waits for besides the lock; ``gate`` is opened when it is ``ready``."""

    @property
    def ready(self) -> bool: ...

    @property
    def gate(self) -> Gate: ...


class _Entry:
    """An entry in the queue, and the frame whose ``with`` block it is for."""

    __slots__ = ("awaited", "frame", "gate", "thread")

    def __init__(self, frame: FrameType, awaited: Awaited | None = None) -> None:
        self.frame, self.thread, self.awaited = frame, threading.get_ident(), awaited
        self.gate = Gate() if awaited is None else awaited.gate

    def __repr__(self) -> str:
        return f"<entry of thread {self.thread}>"


class FairLock:
    """Hands the model to one forward at a time, in the order of asking.

    It is held for one prefill or one decoding step, and never across a ``yield``, so that streams interleave, and a
    call made while another one streams does not wait for its end.

    An exception that a signal handler raises, KeyboardInterrupt among them, may come between any two instructions here,
    and so between a block's end and its release. So there is no count that could be left wrong, only the queue itself:
    its first entry has the lock, entering and leaving are one operation of a dictionary each, and those who wait
    remove an entry whose ``with`` block is no longer being executed.
    """

    def __init__(self) -> None:
        self._queue: dict[_Entry, None] = {}
        self.refusal: str | None = None
        """Why the lock is not given to anybody any more; the message of the error that is raised."""

    def __enter__(self) -> None:
        self._enter(sys._getframe(1))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop(sys._getframe(1))

    def turn(self, awaited: Awaited) -> _Turn:
        """For a ``with`` block: waits for the lock, or until ``awaited`` is ready; says whether it is the lock."""
        return _Turn(self, awaited)

    @property
    def idle(self) -> bool:
        return self._first() is None

    @property
    def waiting(self) -> int:
        """How many callers wait for it."""
        return max(0, len(self._queue) - 1)

    # ---- forks ----------------------------------------------------------------------------------------------------

    def hold(self, frame: FrameType, patience: float) -> object | None:
        """Take it outside of a ``with`` block, until `release` is called with the result or ``frame`` has ended.

        None where the calling thread has it already. Raises TimeoutError once it has waited for so many seconds.
        """
        mine = [entry for entry in list(self._queue) if entry.thread == threading.get_ident()]
        if mine and self._first() in mine:
            return None
        entry = _Entry(frame)
        try:
            self._queue[entry] = None
            self._wait(entry, time.monotonic() + (0 if mine else patience))
        except BaseException:
            self._leave(entry)
            raise
        return entry

    def release(self, entry: object | None) -> None:
        if isinstance(entry, _Entry):
            self._leave(entry)

    def after_fork(self) -> None:
        """In a forked process: the threads in the queue are gone."""
        self._queue = {}

    # ---- the queue ------------------------------------------------------------------------------------------------

    def _enter(self, frame: FrameType, awaited: Awaited | None = None) -> bool:
        self._drop(frame)
        entry = _Entry(frame, awaited)
        try:
            self._queue[entry] = None
            self._wait(entry, None)
            if awaited is not None and awaited.ready:
                self._leave(entry)
                return False
            if self.refusal is not None:
                raise ConfigurationError(self.refusal)
            return True
        except BaseException:
            self._leave(entry)
            raise

    def _wait(self, entry: _Entry, until: float | None) -> None:
        while next(iter(list(self._queue))) is not entry and self._first() is not entry:
            if entry.awaited is not None and entry.awaited.ready:
                return
            entry.gate.wait(_LOOK)
            if until is not None and time.monotonic() > until:
                raise TimeoutError

    def _first(self) -> _Entry | None:
        """Who has the lock. Removes entries at the beginning of the queue whose block has ended."""
        while queue := list(self._queue):
            if _executing(queue[0].frame):
                return queue[0]
            self._leave(queue[0])
        return None

    def _leave(self, entry: _Entry) -> None:
        self._queue.pop(entry, None)
        for following in list(self._queue)[:1]:
            following.gate.open()

    def _drop(self, frame: FrameType) -> None:
        """Remove this frame's entry: the one it has, or one that an interrupt has left behind."""
        for entry in list(self._queue):
            if entry.frame is frame:
                self._leave(entry)


class _Turn:
    __slots__ = ("_awaited", "_lock")

    def __init__(self, lock: FairLock, awaited: Awaited) -> None:
        self._lock, self._awaited = lock, awaited

    def __enter__(self) -> bool:
        return self._lock._enter(sys._getframe(1), self._awaited)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock._drop(sys._getframe(1))


def _executing(frame: FrameType) -> bool:
    """Whether a function is still being executed, by whichever thread."""
    try:
        frame.clear()  # refuses for such frames; what has ended does not need its variables
    except RuntimeError as error:
        if raised_by_signal(error):
            raise
        return True
    return False
