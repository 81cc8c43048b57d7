"""HTTP clients of an object, which can be neither copied, pickled nor shared with a forked process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class _Here:
    """The owner of what belongs to the process as a whole."""


class PerProcess(Generic[T]):
    """One ``T`` a process and owner, made when it is first asked for. Copied, pickled or forked, it begins empty."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._process, self._lock, self._here = os.getpid(), threading.Lock(), _Here()
        self._made = weakref.WeakKeyDictionary[Any, T]()

    def get(self, make: Callable[[], T], owner: Any = None) -> T:
        """``owner``: whose it is, and ends with, such as an event loop; None: the process."""
        if self._process != os.getpid():  # forked: sockets that the parent uses, and perhaps a lock that it held
            self._begin()
        owner = self._here if owner is None else owner
        with self._lock:
            if owner not in self._made:
                self._made[owner] = make()
            return self._made[owner]

    def clear(self) -> None:
        self._begin()

    def __copy__(self) -> PerProcess[T]:
        return PerProcess()

    def __deepcopy__(self, memo: Any) -> PerProcess[T]:
        return PerProcess()

    def __reduce__(self) -> tuple[Any, ...]:
        return cast(Any, PerProcess), ()
