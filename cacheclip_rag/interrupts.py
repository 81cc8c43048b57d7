"""Code that signal handlers interrupt: they run on the main thread between any two instructions, and may raise."""

from __future__ import annotations

import signal
import threading
from types import CodeType
from typing import Any


def raised_by_signal(error: BaseException) -> bool:
    """Whether a signal handler raised this, whatever its class: a time limit, say, that has nothing to do with the code
    it interrupted. For those who answer the failures of that code.
    """
    codes = set()
    seen: BaseException | None = error
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None:
            codes.add(trace.tb_frame.f_code)
            trace = trace.tb_next
        seen = seen.__cause__  # not __context__: that may be what the caller was dealing with
    if len(codes) < 2:  # raised where it is caught
        return False
    return any(_code(signal.getsignal(number)) in codes for number in signal.valid_signals())


def _code(handler: Any) -> CodeType | None:
    """The Python code that runs when ``handler`` is called: a function, a method, a partial, an object."""
    for _ in range(8 if callable(handler) else 0):
        code = getattr(handler, "__code__", None)
        if isinstance(code, CodeType):
            return code
        handler = getattr(handler, "func", None) or getattr(handler, "__func__", None) or type(handler).__call__
    return None


class Gate:
    """Lets a waiting thread through each time it is opened.

    Unlike an ``Event`` it may be opened from a signal handler, or from the garbage collector, while the same thread is
    just opening it, and an interrupt leaves no lock behind in it.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def wait(self, seconds: float) -> None:
        """Until it is opened, or so many seconds have passed."""
        self._lock.acquire(timeout=seconds)

    def open(self) -> None:
        try:
            self._lock.release()
        except RuntimeError as error:  # it is open
            if raised_by_signal(error):
                raise
