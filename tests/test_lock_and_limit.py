"""The lock on the model and the limit of requests: first come, first served, and nothing is lost with an interrupt."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
from threads import PATIENCE, join, start, until

from cacheclip_rag.serving import limit as limit_module
from cacheclip_rag.serving.limit import Place, RequestLimit
from cacheclip_rag.serving.lock import FairLock, _executing

# ---- turns -------------------------------------------------------------------------------------------------------


def test_who_asked_first_goes_first() -> None:
    turns, order = FairLock(), []

    def take(number: int) -> None:
        with turns:
            order.append(number)

    threads = []
    with turns:
        for number in range(20):
            threads.append(start(lambda number=number: take(number)))  # type: ignore[misc]
            until(lambda number=number: turns.waiting == number + 1)  # type: ignore[misc]
        assert order == [] and not turns.idle
    join(*threads)
    assert order == list(range(20)) and turns.idle


def test_one_who_comes_back_at_once_waits_behind_the_others() -> None:
    turns, order, ready = FairLock(), [], threading.Barrier(2)

    def greedy() -> None:
        with turns:
            ready.wait(PATIENCE)
            until(lambda: turns.waiting == 1)
            order.append("greedy")
        with turns:
            order.append("greedy again")

    def patient() -> None:
        ready.wait(PATIENCE)
        with turns:
            order.append("patient")

    join(start(greedy), start(patient))
    assert order == ["greedy", "patient", "greedy again"]


def test_there_is_only_one_turn_at_a_time() -> None:
    turns, inside, most, count = FairLock(), [0], [0], [0]

    def work() -> None:
        for _ in range(200):
            with turns:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0)
                count[0] += 1
                inside[0] -= 1

    join(*[start(work) for _ in range(8)])
    assert most == [1] and count == [1600] and turns.idle


def test_a_turn_ends_with_an_error() -> None:
    turns = FairLock()
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), turns:
            raise error
        assert turns.idle


@pytest.mark.parametrize("granted", [False, True])
def test_an_interrupt_while_waiting_loses_no_turn(monkeypatch: pytest.MonkeyPatch, granted: bool) -> None:
    turns, go, done = FairLock(), threading.Event(), list[str]()

    def interrupted(*_: Any) -> None:
        if granted:  # the turn comes at the very moment of the interrupt
            go.set()
            until(lambda: done == ["first"])
        raise KeyboardInterrupt

    def hold() -> None:
        with turns:
            ready.set()
            assert go.wait(PATIENCE)
        done.append("first")

    ready = threading.Event()
    holder = start(hold)
    assert ready.wait(PATIENCE)
    with monkeypatch.context() as patch:
        patch.setattr(turns, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt), turns:
            pytest.fail("nobody gave it the turn")
    assert turns.idle is granted and not turns.waiting
    go.set()
    join(holder)
    with turns:
        assert not turns.idle
    assert turns.idle


def traced(work: Callable[[], Any], codes: set[CodeType], event: str, at: int) -> bool:
    """Do ``work``, and raise KeyboardInterrupt at the ``at``-th event (line, or opcode) in these functions. Whether
    there were as many.
    """
    left = [at]

    def local(frame: FrameType, what: str, _: Any) -> Any:
        if what == event:
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt
        return local

    def trace(frame: FrameType, what: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = event == "opcode"
        return local

    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return left[0] < 0


def functions(*classes: type) -> set[CodeType]:
    codes = set()
    for one in classes:
        for member in vars(one).values():
            for function in (member, getattr(member, "fget", None)):
                if hasattr(function, "__code__"):
                    codes.add(function.__code__)
    return codes


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_an_interrupt_at_any_instruction_loses_no_turn(event: str) -> None:
    turns = FairLock()

    def block() -> None:
        with turns:
            pass

    def work() -> None:
        block()

    at, codes = 0, {*functions(FairLock), block.__code__, _executing.__code__}
    while traced(work, codes, event, at):
        got: list[bool] = []

        def other(got: list[bool] = got) -> None:
            with turns:
                got.append(True)

        join(start(other))
        assert got and turns.idle and not turns.waiting, f"lost at {event} {at}"
        at += 1
    assert at > 10


@pytest.mark.parametrize("event", ["line", "opcode"])
def test_an_interrupt_at_any_instruction_loses_no_place(event: str) -> None:
    limit = RequestLimit(1)

    def tokens(place: Place) -> Iterator[int]:
        try:
            if place.take():
                yield 1
        finally:
            place.release()

    def work() -> None:
        place = limit.place()
        made = tokens(place)
        place.owner = weakref.ref(made)
        list(made)

    at, codes = 0, {*functions(RequestLimit, Place), tokens.__code__}
    while traced(work, codes, event, at):
        place = limit.place()
        join(start(place.take))
        assert place.taken and limit.in_flight == 1 and not limit.waiting, f"lost at {event} {at}"
        place.release()
        at += 1
    assert at > 10


# ---- limit -------------------------------------------------------------------------------------------------------


def taken(limit: RequestLimit, cancel: threading.Event | None = None) -> Place:
    place = limit.place()
    assert place.take(cancel)
    return place


def test_places_are_given_in_the_order_of_asking() -> None:
    limit, order = RequestLimit(2), []
    held = [taken(limit), taken(limit)]
    assert limit.in_flight == 2

    def take(number: int) -> None:
        place = taken(limit)
        order.append(number)
        place.release()

    threads = []
    for number in range(10):
        threads.append(start(lambda number=number: take(number)))  # type: ignore[misc]
        until(lambda number=number: limit.waiting == number + 1)  # type: ignore[misc]
    assert order == []
    held[0].release()
    held[0].release()  # again: it is no second place
    join(*threads)
    assert order == list(range(10)) and limit.in_flight == 1


def test_a_caller_who_goes_away_takes_no_place() -> None:
    limit, cancel, results = RequestLimit(1), threading.Event(), []
    held = taken(limit)
    waiting = start(lambda: results.append(limit.place().take(cancel)))
    until(lambda: limit.waiting == 1)
    cancel.set()
    join(waiting)
    assert results == [False] and not limit.waiting
    held.release()
    assert not limit.place().take(cancel) and limit.in_flight == 0 and limit.place().take()


def test_who_waits_is_let_in_once_nobody_in_flight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = RequestLimit(2)
    one, two, three = taken(limit), taken(limit), limit.place()
    one.resting_since = 0.0
    waiting = start(three.take)
    until(lambda: limit.waiting == 1)
    assert not limit.at_rest and not three.taken  # the other one is being read
    two.resting_since = 0.0
    join(waiting)
    assert three.taken and limit.in_flight == 3
    four = limit.place()
    waiting = start(four.take)
    until(lambda: limit.waiting == 1)
    three.release()  # and those two still rest
    join(waiting)
    assert limit.in_flight == 3
    four.resting_since = 0.0
    assert limit.at_rest
    for place in (one, two, four):
        place.release()
    assert limit.in_flight == 0 and limit.at_rest


def test_a_long_wait_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(limit_module, "_PATIENCE", 0.05)
    limit = RequestLimit(1)
    held = taken(limit)
    waiting = start(limit.place().take)
    until(lambda: "stream left open" in caplog.text)
    held.release()
    join(waiting)


def test_a_place_may_come_back_from_the_garbage_collector() -> None:
    """It runs where it likes: also on a thread that has just begun to take a place, or to give one."""

    class Places(dict[Place, None]):
        def __setitem__(self, place: Place, value: None) -> None:
            super().__setitem__(place, value)
            if abandoned:
                abandoned.pop().release()

        def pop(self, *arguments: Any) -> Any:
            if abandoned:
                abandoned.pop().release()
            return super().pop(*arguments)

    def work() -> None:
        held = [taken(limit), taken(limit)]
        for place in list(held):
            abandoned.append(place)
            held.append(taken(limit))
        abandoned.append(held[2])
        held[3].release()

    limit, abandoned = RequestLimit(2), list[Place]()
    limit._places = Places()
    join(start(work))
    assert limit.in_flight == 0 and limit.waiting == 0 and not abandoned
