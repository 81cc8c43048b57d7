"""The lock on the model and the limit of requests: first come, first served, and nothing is lost with an interrupt."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from typing import Any

import pytest
from threads import PATIENCE, join, start, until

from cacheclip_rag.serving import limit as limit_module
from cacheclip_rag.serving.limit import RequestLimit
from cacheclip_rag.serving.lock import FairLock


def test_who_asked_first_goes_first() -> None:
    lock, order = FairLock(), []

    def take(number: int) -> None:
        with lock:
            order.append(number)

    threads = []
    with lock:
        for number in range(20):
            threads.append(start(lambda number=number: take(number)))  # type: ignore[misc]
            until(lambda number=number: lock.waiting == number + 1)  # type: ignore[misc]
        assert order == [] and not lock.idle
    join(*threads)
    assert order == list(range(20)) and lock.idle


def test_one_who_comes_back_at_once_waits_behind_the_others() -> None:
    lock, order, ready = FairLock(), [], threading.Barrier(2)

    def greedy() -> None:
        with lock:
            ready.wait(PATIENCE)
            until(lambda: lock.waiting == 1)
            order.append("greedy")
        with lock:
            order.append("greedy again")

    def patient() -> None:
        ready.wait(PATIENCE)
        with lock:
            order.append("patient")

    join(start(greedy), start(patient))
    assert order == ["greedy", "patient", "greedy again"]


def test_there_is_only_one_turn_at_a_time() -> None:
    lock, inside, most, count = FairLock(), [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                count[0] += 1
                inside[0] -= 1

    join(*[start(work) for _ in range(8)])
    assert most == [1] and count == [1600] and lock.idle


def test_a_turn_ends_with_an_error() -> None:
    lock = FairLock()
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), lock:
            raise error
        assert lock.idle
    waiting = []
    with pytest.raises(ValueError), lock:
        thread = start(lambda: waiting.append(lock.__enter__()))
        until(lambda: lock.waiting == 1)
        raise ValueError
    join(thread)
    assert waiting == [None] and not lock.idle


@pytest.mark.parametrize("granted", [False, True])
def test_an_interrupt_while_waiting_loses_no_turn(monkeypatch: pytest.MonkeyPatch, granted: bool) -> None:
    lock = FairLock()

    class Interrupted(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if granted:  # the turn comes at the very moment of the interrupt
                lock.__exit__(None, None, None)
                assert self.is_set()
            raise KeyboardInterrupt

    lock.__enter__()
    monkeypatch.setattr(limit_module.threading, "Event", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        lock.__enter__()
    monkeypatch.undo()
    if not granted:
        assert not lock.idle
        lock.__exit__(None, None, None)
    assert lock.idle
    with lock:
        assert not lock.idle


def test_seats_are_given_in_the_order_of_asking() -> None:
    limit, order = RequestLimit(2), []
    assert limit.acquire() and limit.acquire() and limit.in_flight == 2

    def take(number: int) -> None:
        assert limit.acquire()
        order.append(number)
        limit.release()

    threads = []
    for number in range(10):
        threads.append(start(lambda number=number: take(number)))  # type: ignore[misc]
        until(lambda number=number: limit.waiting == number + 1)  # type: ignore[misc]
    assert order == []
    limit.release()
    join(*threads)
    assert order == list(range(10)) and limit.in_flight == 1


def test_a_caller_who_goes_away_takes_no_seat() -> None:
    limit, cancel, results = RequestLimit(1), threading.Event(), []
    assert limit.acquire()
    waiting = start(lambda: results.append(limit.acquire(cancel)))
    until(lambda: limit.waiting == 1)
    cancel.set()
    join(waiting)
    assert results == [False] and limit.waiting == 0
    limit.release()
    assert not limit.acquire(cancel) and limit.in_flight == 0 and limit.acquire()


@pytest.mark.parametrize("granted", [False, True])
def test_an_interrupt_while_waiting_loses_no_seat(granted: bool) -> None:
    limit = RequestLimit(1)
    assert limit.acquire()

    class Interrupt(threading.Event):
        def is_set(self) -> bool:
            if not limit.waiting:  # it is asked before the queue, too
                return False
            if granted:
                limit.release()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        limit.acquire(Interrupt())
    assert limit.waiting == 0 and limit.in_flight == (0 if granted else 1)


def test_a_long_wait_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(limit_module, "PATIENCE", 0.05)
    limit = RequestLimit(1)
    assert limit.acquire()
    waiting = start(limit.acquire)
    until(lambda: "stream left open" in caplog.text)
    limit.release()
    join(waiting)


@pytest.mark.parametrize("place", range(20))
@pytest.mark.parametrize("held", [1, 2])
def test_a_seat_may_come_back_from_the_garbage_collector(held: int, place: int) -> None:
    """It runs where it likes: at any line of a thread that is just taking a seat, or giving one."""
    limit, lines = RequestLimit(2), itertools.count()

    def collector(frame: Any, event: str, _: object) -> Any:
        if frame.f_code.co_filename != limit_module.__file__:
            return None
        if event == "line" and next(lines) == place:
            limit.release()
        return collector

    def work() -> None:
        for _ in range(held):
            assert limit.acquire()
        sys.settrace(collector)
        try:
            assert limit.acquire()
            limit.release()
        finally:
            sys.settrace(None)

    join(start(work))
    assert next(lines) > place and limit.in_flight == held - 1 and limit.waiting == 0
