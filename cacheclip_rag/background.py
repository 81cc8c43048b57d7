"""Work that can wait until nobody is waiting for an answer."""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

log = logging.getLogger("cacheclip_rag")


Task = TypeVar("Task", bound=Hashable)


class Background(Generic[Task]):
    """One daemon thread that calls ``work(task)`` for every task it is given, each once, in order.

    It does not keep alive the object whose method ``work`` is, and ends with it. A process that is forked begins with
    nothing to do and a thread of its own, once there is something: what waited is its parent's.
    """

    def __init__(self, work: Callable[[Task], None]) -> None:
        self._work: Callable[[], Callable[[Task], None] | None]
        self._work = weakref.WeakMethod(work, self._gone) if inspect.ismethod(work) else lambda: work
        self._waiting: OrderedDict[Task, None] = OrderedDict()
        self._at_hand: list[Task] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._closed = self._over = False
        self._process = os.getpid()

    def _own(self) -> threading.Condition:
        """What to hold. In a forked process a new one: the parent's threads, which may have held it, are not here."""
        if self._process != os.getpid():
            self._changed = threading.Condition()
            self._waiting, self._at_hand, self._thread = OrderedDict(), [], None
            self._busy = self._closed = False
            self._process = os.getpid()
        return self._changed

    def add(self, tasks: Iterable[Task]) -> None:
        with self._own():
            if self._over:
                return
            self._waiting.update(dict.fromkeys(tasks))
            if self._waiting and self._thread is None:
                self._closed = False
                self._thread = threading.Thread(target=self._run, name="cacheclip-background", daemon=True)
                self._thread.start()
                # A daemon thread that is inside torch when the interpreter goes away takes the process down with it.
                atexit.register(self._end)
            self._changed.notify_all()

    def drop(self, unwanted: Callable[[Task], bool]) -> None:
        """Leave out the tasks that wait and are unwanted. One that is at hand is told so by `wanted`."""
        with self._own():
            for task in list(filter(unwanted, self._waiting)):
                del self._waiting[task]
            self._at_hand = [task for task in self._at_hand if not unwanted(task)]
            self._changed.notify_all()

    def wanted(self) -> bool:
        """For ``work``: whether its task has not been dropped since it was begun."""
        with self._own():
            return bool(self._at_hand)

    @property
    def busy(self) -> bool:
        """Whether a task is at hand."""
        return self._busy

    def flush(self) -> None:
        """Wait until nothing is left to do."""
        with self._own():
            self._changed.wait_for(lambda: self._closed or not (self._waiting or self._busy))

    def close(self) -> None:
        """Finish the task at hand, drop the rest. The next `add` begins again."""
        atexit.unregister(self._end)
        with self._own():
            self._closed = True
            self._waiting.clear()
            thread, self._thread = self._thread, None
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _end(self) -> None:
        self._over = True
        self.close()

    def _gone(self, _: object) -> None:
        try:
            atexit.unregister(self._end)
        except AttributeError:  # at the interpreter's end, modules may have gone before
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped() or self._waiting)
                if self._stopped():
                    return
                task, _ = self._waiting.popitem(last=False)
                self._busy, self._at_hand = True, [task]
            try:
                if (work := self._work()) is not None:
                    work(task)
            except BaseException:  # whatever it was, the next task must not wait for it
                log.exception("background encoding failed")
            finally:
                work = None  # or this thread would keep its object alive while it waits
                with self._changed:
                    self._busy, self._at_hand = False, []
                    self._changed.notify_all()

    def _stopped(self) -> bool:
        """Closed, also where a new thread has been started since."""
        return self._closed or self._thread is not threading.current_thread()
