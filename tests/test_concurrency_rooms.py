"""FairLock, work in the background, and the prompt heads that requests share."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from cacheclip_rag.background import Background
from cacheclip_rag.kv.preamble import WORTH, PreambleCache
from cacheclip_rag.model.canvas import Canvas
from cacheclip_rag.serving import limit as limit_module
from cacheclip_rag.serving.limit import Place, RequestLimit
from cacheclip_rag.serving.lock import FairLock, _executing

PATIENCE = 20.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.001)


def start(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "dead lock"


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


# ---- background --------------------------------------------------------------------------------------------------


def test_texts_are_worked_on_in_order_and_flush_waits_for_them() -> None:
    done: list[str] = []

    def work(text: str) -> None:
        time.sleep(0.005)
        done.append(text)

    background = Background(work)
    background.add(["a", "b"])
    background.add(iter(["c"]))
    background.flush()
    assert done == ["a", "b", "c"]
    background.add(["d"])
    background.flush()
    assert done == ["a", "b", "c", "d"]
    background.close()


def test_flush_waits_for_the_text_at_hand() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def work(text: str) -> None:
        begun.set()
        go.wait(PATIENCE)
        done.append(text)

    background = Background(work)
    background.add(["a"])
    assert begun.wait(PATIENCE)
    flushing = start(background.flush)
    flushing.join(0.05)
    assert flushing.is_alive() and done == []
    go.set()
    join(flushing)
    assert done == ["a"]
    background.close()


def test_a_text_that_waits_already_is_not_worked_on_twice() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def work(text: str) -> None:
        begun.set()
        go.wait(PATIENCE)
        done.append(text)

    background = Background(work)
    background.add(["first", "a", "b", "a"])
    assert begun.wait(PATIENCE)
    background.add(["b", "c", "a"])
    go.set()
    background.flush()
    assert done == ["first", "a", "b", "c"]
    background.close()


def test_an_error_is_logged_and_the_others_are_worked_on(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def work(text: str) -> None:
        if text == "bad":
            raise RuntimeError("out of memory")
        done.append(text)

    background = Background(work)
    with caplog.at_level(logging.ERROR, logger="cacheclip_rag"):
        background.add(["a", "bad", "b"])
        background.flush()
    assert done == ["a", "b"] and "out of memory" in caplog.text
    background.close()


def test_closing_finishes_the_text_at_hand_and_drops_the_rest() -> None:
    begun, go, done = threading.Event(), threading.Event(), []

    def work(text: str) -> None:
        begun.set()
        go.wait(PATIENCE)
        done.append(text)

    background = Background(work)
    background.add(["a", "b", "c"])
    assert begun.wait(PATIENCE)
    flushing, closing = start(background.flush), start(background.close)
    join(flushing)  # nobody waits for what will not be done
    assert closing.is_alive()
    go.set()
    join(closing)
    assert done == ["a"]
    background.add(["d"])
    background.flush()
    background.close()
    assert done == ["a", "d"]  # but what is asked for later is


def test_work_may_add_work_and_may_close() -> None:
    done: list[str] = []

    def work(text: str) -> None:
        done.append(text)
        if text == "a":
            background.add(["b"])
        if text == "last":
            background.close()

    background = Background(work)
    background.add(["a"])
    background.flush()
    background.add(["last", "never"])
    background.flush()
    until(lambda: background._thread is None)
    assert done == ["a", "b", "last"]
    background.add(["more"])  # what was closed begins again when there is more to do
    background.flush()
    assert done == ["a", "b", "last", "more"]
    background.close()


def test_background_work_does_not_keep_its_object_alive() -> None:
    class Worker:
        def __init__(self) -> None:
            self.done: list[str] = []
            self.background = Background(self.work)

        def work(self, text: str) -> None:
            self.done.append(text)

    worker = Worker()
    worker.background.add(["a"])
    worker.background.flush()
    thread, gone = worker.background._thread, weakref.ref(worker)
    assert worker.done == ["a"] and thread is not None
    del worker
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_idle_background_costs_no_thread_and_flushes_at_once() -> None:
    before = threading.active_count()
    background = Background(lambda text: None)
    background.add([])
    background.flush()
    assert threading.active_count() == before
    background.close()


def test_many_threads_add() -> None:
    done: list[str] = []
    background = Background(done.append)
    join(*[start(lambda k=k: background.add(f"{k}-{i}" for i in range(50))) for k in range(8)])  # type: ignore[misc]
    background.flush()
    assert sorted(done) == sorted(f"{k}-{i}" for k in range(8) for i in range(50))
    background.close()


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


def test_heads_that_extend_one_another_are_kept_once_and_within_their_bytes() -> None:
    ids = torch.arange(64)
    one = 2 * 2 * 4 * 4  # bytes of a row on that canvas: keys and values, two layers, four numbers of four bytes
    cache = PreambleCache(capacity_bytes=100 * one)
    for length in (16, 32, 64):
        cache.keep(ids, length, canvas(ids))
    assert cache.nbytes == 64 * one
    found = cache.longest(ids[:20])
    assert found is not None and found[0].shape[2] == 20
    cache.keep(ids + 100, 64, canvas(ids + 100))
    assert cache.nbytes == 64 * one and cache.longest(ids) is None


# ---- prompt heads ------------------------------------------------------------------------------------------------


def canvas(ids: Tensor) -> Canvas:
    """A canvas whose row j holds the number of the token there."""
    made = Canvas(2, 1, 4, len(ids) + 3, dtype=torch.float32, device="cpu")
    rows = ids.float()[None, None, :, None].expand(2, 1, -1, 4)
    made.write(0, rows, -rows)
    return made


def keep(cache: PreambleCache, ids: Tensor, length: int | None = None) -> None:
    cache.keep(ids, len(ids) if length is None else length, canvas(ids))


def longest(cache: PreambleCache, ids: Tensor) -> int:
    """The length of what is found, which has to be the KV of these very tokens."""
    found = cache.longest(ids)
    if found is None:
        return 0
    keys, values = found
    size = keys.shape[2]
    expected = ids[:size].float()[None, None, :, None].expand(2, 1, -1, 4)
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    return size


def head(*parts: range) -> Tensor:
    return torch.tensor([i for part in parts for i in part])


def test_the_longest_common_head_is_found() -> None:
    cache = PreambleCache()
    keep(cache, head(range(20)))
    keep(cache, head(range(12), range(100, 130)))
    assert longest(cache, head(range(20), range(500, 510))) == 20
    assert longest(cache, head(range(15), range(500, 510))) == 15
    assert longest(cache, head(range(12), range(100, 105), range(7))) == 17
    assert longest(cache, head(range(12))) == 12
    assert longest(cache, head(range(1, 30))) == 0


def test_only_the_asked_for_rows_of_a_canvas_are_kept() -> None:
    cache = PreambleCache()
    keep(cache, head(range(40)), length=10)
    assert longest(cache, head(range(40))) == 10


def test_short_heads_are_not_worth_it() -> None:
    cache = PreambleCache()
    keep(cache, head(range(WORTH - 1)))
    assert longest(cache, head(range(WORTH - 1))) == 0
    keep(cache, head(range(50)))
    assert longest(cache, head(range(WORTH - 1), range(900, 950))) == 0
    assert longest(cache, head(range(WORTH), range(900, 950))) == WORTH


def test_what_is_kept_is_a_copy() -> None:
    cache, ids = PreambleCache(), head(range(20))
    made = canvas(ids)
    cache.keep(ids, 20, made)
    made.keys.zero_()
    made.values.zero_()
    assert longest(cache, ids) == 20


def test_the_head_used_longest_ago_is_dropped() -> None:
    cache = PreambleCache(size=3)
    heads = [head(range(100 * n, 100 * n + 20)) for n in range(5)]
    for ids in heads[:3]:
        keep(cache, ids)
    assert longest(cache, heads[0]) == 20  # a use
    keep(cache, heads[3])
    assert [longest(cache, ids) for ids in heads[:4]] == [20, 0, 20, 20]


def test_a_head_that_another_one_begins_with_is_not_kept_twice() -> None:
    cache = PreambleCache(size=2)
    other, long = head(range(500, 530)), head(range(50))
    keep(cache, other)
    keep(cache, long)
    for length in (10, 20, 50):
        keep(cache, long, length)
    assert longest(cache, other) == 30 and longest(cache, long) == 50


def test_heads_from_many_threads() -> None:
    cache, errors = PreambleCache(size=4), []

    def work(n: int) -> None:
        try:
            for i in range(60):
                ids = head(range(5), range(1000 * (i % 6), 1000 * (i % 6) + 20 + n))
                keep(cache, ids)
                longest(cache, ids)
        except BaseException as error:
            errors.append(error)

    join(*[start(lambda n=n: work(n)) for n in range(6)])  # type: ignore[misc]
    assert not errors
    assert sum(longest(cache, head(range(5), range(1000 * i, 1000 * i + 30))) > 5 for i in range(6)) <= 4
