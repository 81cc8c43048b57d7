"""Work that can wait until nobody is waiting for an answer."""

from __future__ import annotations

import atexit
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

log = logging.getLogger("cacheclip_rag")


Task = TypeVar("Task", bound=Hashable)


class Background(Generic[Task]):
    """One daemon thread that calls ``work(task)`` for every task it is given, each once, in order."""

    def __init__(self, work: Callable[[Task], None]) -> None:
        self._work = work
        self._waiting: OrderedDict[Task, None] = OrderedDict()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = self._closed = False

    def add(self, tasks: Iterable[Task]) -> None:
        with self._changed:
            if self._closed:
                return
            self._waiting.update(dict.fromkeys(tasks))
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="cacheclip-background", daemon=True)
                self._thread.start()
                # A daemon thread that is inside torch when the interpreter goes away takes the process down with it.
                atexit.register(self.close)
            self._changed.notify_all()

    def drop(self, unwanted: Callable[[Task], bool]) -> None:
        """Leave out the tasks that wait and are unwanted."""
        with self._changed:
            for task in list(filter(unwanted, self._waiting)):
                del self._waiting[task]
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until nothing is left to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not (self._waiting or self._busy))

    def close(self) -> None:
        """Finish the task at hand, drop the rest."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                task, _ = self._waiting.popitem(last=False)
                self._busy = True
            try:
                self._work(task)
            except BaseException:  # whatever it was, the next task must not wait for it
                log.exception("background encoding failed")
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
