"""Work that can wait until nobody is waiting for an answer."""

from __future__ import annotations

import atexit
import inspect
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from .interrupts import Gate

log = logging.getLogger("cacheclip_rag")


Task = TypeVar("Task", bound=Hashable)


_LOOK = 5.0
"""Seconds between two looks of the thread at what there is to do, should it not have been woken."""


class Background(Generic[Task]):
    """One daemon thread that calls ``work(task)`` for every task it is given, each once, in order.

    It does not keep alive the object whose method ``work`` is, and ends with it. A thread that a fork of the process
    has left behind is started again by the next `add` or `flush`.
    """

    def __init__(self, work: Callable[[Task], None]) -> None:
        self._work: Callable[[], Callable[[Task], None] | None]
        self._work = weakref.WeakMethod(work, self._gone) if inspect.ismethod(work) else lambda: work
        self._waiting: OrderedDict[Task, None] = OrderedDict()
        self._at_hand: list[Task] = []
        # Not a Condition, whose `__exit__` is Python: an interrupt at its beginning would leave it locked for ever.
        self._lock = threading.RLock()
        self._gate = Gate()
        self._flushing: list[Gate] = []
        self._thread: threading.Thread | None = None
        self._busy = self._closed = self._over = False

    def add(self, tasks: Iterable[Task]) -> None:
        with self._lock:
            if self._over:
                return
            self._waiting.update(dict.fromkeys(tasks))
            if self._waiting:
                self._begin()
        self._gate.open()

    def drop(self, unwanted: Callable[[Task], bool]) -> None:
        """Leave out the tasks that wait and are unwanted. One that is at hand is told so by `wanted`."""
        with self._lock:
            for task in list(filter(unwanted, self._waiting)):
                del self._waiting[task]
            self._at_hand = [task for task in self._at_hand if not unwanted(task)]
        self._told()

    def wanted(self) -> bool:
        """For ``work``: whether its task has not been dropped since it was begun."""
        with self._lock:
            return bool(self._at_hand)

    def ending(self) -> bool:
        """For ``work``: whether somebody waits for it to return, to close this."""
        return self._stopped()

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a task is at hand."""
        return self._busy

    def flush(self) -> None:
        """Wait until nothing is left to do."""
        gate = Gate()
        self._flushing.append(gate)
        try:
            while not self._closed and (self._waiting or self._busy):
                with self._lock:
                    if self._waiting and not self._closed and not self._over:
                        self._begin()
                self._gate.open()
                gate.wait(_LOOK)
        finally:
            self._flushing.remove(gate)

    def close(self) -> None:
        """Finish the task at hand, drop the rest. The next `add` begins again."""
        atexit.unregister(self._end)
        with self._lock:
            self._closed = True
            self._waiting.clear()
            thread, self._thread = self._thread, None
        self._told()
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            thread.join()

    def after_fork(self) -> None:
        """In a forked process, where the thread is not: what it was doing is still to be done."""
        self._lock, self._gate, self._flushing = threading.RLock(), Gate(), []
        self._waiting = OrderedDict.fromkeys([*self._at_hand, *self._waiting])
        self._thread, self._at_hand, self._busy = None, [], False

    def _begin(self) -> None:
        """Start the thread, unless it runs."""
        if self._thread is None or not self._thread.is_alive():
            self._closed = False
            self._thread = threading.Thread(target=self._run, name="cacheclip-background", daemon=True)
            self._thread.start()
            # A daemon thread that is inside torch when the interpreter goes away takes the process down with it.
            atexit.unregister(self._end)
            atexit.register(self._end)

    def _end(self) -> None:
        self._over = True
        self.close()

    def _gone(self, _: object) -> None:
        try:
            atexit.unregister(self._end)
        except AttributeError:  # at the interpreter's end, modules may have gone before
            return
        self._closed = True
        self._told()

    def _told(self) -> None:
        """Wake the thread and whoever waits for it."""
        for gate in [self._gate, *self._flushing]:
            gate.open()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._stopped():
                    return
                tasks = [self._waiting.popitem(last=False)[0]] if self._waiting else []
                if tasks:
                    self._busy, self._at_hand = True, list(tasks)
            if not tasks:
                self._gate.wait(_LOOK)
                continue
            try:
                if (work := self._work()) is not None:
                    work(tasks.pop())
            except BaseException:  # whatever it was, the next task must not wait for it
                log.exception("background encoding failed")
            finally:
                work = None  # or this thread would keep its object alive while it waits
                with self._lock:
                    self._busy, self._at_hand = False, []
                self._told()

    def _stopped(self) -> bool:
        """Closed, also where a new thread has been started since."""
        return self._closed or self._thread is not threading.current_thread()
