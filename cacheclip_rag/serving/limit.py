"""A first-come, first-served limit on the number of requests in flight."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol
from weakref import ref

from ..interrupts import Gate

log = logging.getLogger("cacheclip_rag")

REST = 0.05
"""Seconds since the last token was read after which a stream counts as unread."""
_LOOK = 0.02
"""Seconds between two checks of the next request whether it may start or was cancelled."""
_PATIENCE = 60.0
"""Seconds of waiting after which a warning is logged."""


class Cancel(Protocol):
    """A ``threading.Event``, or whatever else can tell that an answer is no longer wanted."""

    def is_set(self) -> bool: ...


class Place:
    """A request's place among those in flight. Taking and releasing it twice does no harm.

    ``owner``: the generator that answers. Once it has ended, by whatever cause, the place is free.
    """

    __slots__ = ("__weakref__", "_limit", "gate", "owner", "resting_since", "taken")

    def __init__(self, limit: RequestLimit) -> None:
        self._limit = limit
        self.owner: ref[Any] | None = None
        self.taken = False
        self.resting_since: float | None = None
        """When the last token was handed out; None while one is being computed."""
        self.gate = Gate()

    def take(self, cancel: Cancel | None = None) -> bool:
        """Wait until the request may start. Returns False, without a place, if ``cancel`` is set before."""
        return self._limit._take(self, cancel)

    def release(self) -> None:
        self._limit._leave(self)

    @property
    def over(self) -> bool:
        if self.owner is None:
            return False
        owner = self.owner()
        return owner is None or owner.gi_frame is None

    @property
    def rests(self) -> bool:
        since = self.resting_since
        return since is not None and time.monotonic() - since >= REST


class RequestLimit:
    """At most ``limit`` requests are in flight, each with a canvas in memory; others wait, in the order of asking.

    A place is held from before the prefill to the end of the answer. A stream that is neither read to its end nor
    closed keeps its place, but while none of those in flight is being read, the next one is admitted beyond the limit:
    the thread that waits may be the one that would read them.

    As in `FairLock`, there is no state that an interrupt could leave half changed: the places in the order of asking
    are all there is, and everything else follows from them. Nor is there a lock, because the garbage collector, which
    may run on a thread that is in one of these methods, ends streams that nobody holds any more.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._places: dict[Place, None] = {}

    def place(self) -> Place:
        """A place that is neither taken nor asked for yet."""
        return Place(self)

    @property
    def in_flight(self) -> int:
        return sum(place.taken for place in self._there())

    @property
    def waiting(self) -> int:
        return sum(not place.taken for place in self._there())

    @property
    def at_rest(self) -> bool:
        """Whether nobody waits for a token: none in flight, or only streams that nobody reads."""
        return all(place.rests for place in self._there())

    def wait_for_rest(self, seconds: float, over: Callable[[], bool]) -> bool:
        """Wait until `at_rest`, for so long at most, or until it is ``over``. Returns whether it is at rest."""
        patience = time.monotonic() + seconds
        while not (rests := self.at_rest) and time.monotonic() < patience and not over():
            time.sleep(_LOOK)
        return rests

    def after_fork(self) -> None:
        """In a forked process: whoever was in flight is answered by the other one."""
        self._places = {}

    def _take(self, place: Place, cancel: Cancel | None) -> bool:
        if place.taken:
            return True
        start, told = time.monotonic(), False
        try:
            if cancel is not None and cancel.is_set():
                return False
            self._places[place] = None
            while not self._free_for(place):
                first = self._next() is place
                place.gate.wait(_LOOK if first else 5 * _LOOK)
                if cancel is not None and cancel.is_set():
                    return False
                if not told and time.monotonic() - start >= _PATIENCE:
                    told = True
                    log.warning("a request waits for one of %d in flight to end; is a stream left open?", self.limit)
            place.taken = True
            self._wake()
            return True
        finally:
            if not place.taken:
                self._leave(place)

    def _free_for(self, place: Place) -> bool:
        if self._next() is not place:
            return False
        taken = [one for one in self._there() if one.taken]
        return len(taken) < self.limit or all(one.rests for one in taken)

    def _next(self) -> Place | None:
        """Who has waited longest."""
        return next((one for one in self._there() if not one.taken), None)

    def _there(self) -> list[Place]:
        """Places that are taken or waited for; those of requests that have ended are taken out."""
        there = list(self._places)
        gone = [place for place in there if place.over]
        for place in gone:
            self._places.pop(place, None)
        return [place for place in there if place not in gone] if gone else there

    def _leave(self, place: Place) -> None:
        self._places.pop(place, None)
        place.taken = False
        self._wake()

    def _wake(self) -> None:
        following = self._next()
        if following is not None:
            following.gate.open()
