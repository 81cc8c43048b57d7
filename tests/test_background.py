"""Background work: each task once, in order, and an end that waits for nothing."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import pytest
from threads import PATIENCE, join, start

from cacheclip_rag.background import Background


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
    done, threads = list[str](), set[threading.Thread]()

    def work(text: str) -> None:
        done.append(text)
        threads.add(threading.current_thread())
        if text == "a":
            background.add(["b"])
        if text == "last":
            background.close()

    background = Background(work)
    background.add(["a"])
    background.flush()
    background.add(["last", "never"])
    background.flush()
    join(*threads)
    assert done == ["a", "b", "last"]
    background.add(["more"])  # what was closed begins again when there is more to do
    background.flush()
    assert done == ["a", "b", "last", "more"]
    background.close()


def test_background_work_does_not_keep_its_object_alive() -> None:
    class Worker:
        def __init__(self) -> None:
            self.threads: list[threading.Thread] = []
            self.background = Background(self.work)

        def work(self, text: str) -> None:
            self.threads.append(threading.current_thread())

    worker = Worker()
    worker.background.add(["a"])
    worker.background.flush()
    (thread,), gone = worker.threads, weakref.ref(worker)
    assert thread.is_alive()
    del worker
    gc.collect()
    assert gone() is None
    join(thread)


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
