"""An engine in a process that was forked after it was opened: it works there, or says why not."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.serving import forks

if not hasattr(os, "fork"):
    pytest.skip("forks are Unix's", allow_module_level=True)
import torture_serving
from torture_serving import child


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


PROMPT = "\n\n".join([*PASSAGES[:2], "Who built it?"])


def test_a_child_of_an_idle_parent_does_everything(backbone: Backbone, tmp_path: Path) -> None:
    with Engine(backbone, method="query_guided", store=tmp_path) as engine:
        engine.ensure(PASSAGES[:2])
        expected = engine.generate(PROMPT, max_new_tokens=4).ids
        engine.ensure_later(PASSAGES[2:3])
        engine.flush()  # the background's thread runs, in the parent

        def works() -> None:
            assert engine.generate(PROMPT, max_new_tokens=4).ids == expected
            engine.ensure_later(PASSAGES[3:4])
            engine.hint(PASSAGES[:1])
            engine.flush()
            assert engine.knows(PASSAGES[3])
            engine.forget(PASSAGES[3:4])
            engine.close()

        assert child(works) == "ok"
        assert child(engine.flush) == "ok"
        assert child(engine.close) == "ok"
        assert engine.generate(PROMPT, max_new_tokens=4).ids == expected


def test_what_the_parent_put_off_is_done_in_the_child_too(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:
        begun, go = threading.Event(), threading.Event()

        def blocked(*arguments: Any, **options: Any) -> Any:
            begun.set()
            assert go.wait(120)
            return real(*arguments, **options)

        real, owner = engine.corpus._ensure_batch, os.getpid()
        engine.corpus._ensure_batch = (  # type: ignore[method-assign]
            lambda *a, **o: (blocked if os.getpid() == owner else real)(*a, **o)
        )
        engine.ensure_later(PASSAGES[:2])
        assert begun.wait(120)  # one is at hand, one waits

        def works() -> None:
            engine.flush()
            assert engine.knows(PASSAGES[0]) and engine.knows(PASSAGES[1])

        try:
            assert child(works) == "ok"
        finally:
            go.set()
        engine.flush()
        assert engine.knows(PASSAGES[0]) and engine.knows(PASSAGES[1])


def test_streams_of_the_parent_take_no_place_in_the_child(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        expected = engine.generate(PROMPT, max_new_tokens=4).ids
        with engine.stream(PROMPT, max_new_tokens=50, min_new_tokens=50) as stream:
            next(stream)

            def works() -> None:
                assert engine.stats().in_flight == 0
                assert engine.generate(PROMPT, max_new_tokens=4).ids == expected
                assert next(stream, None) is not None  # and the thread that forked may go on with its own
                stream.close()

            assert child(works) == "ok"
            assert engine.stats().in_flight == 1


def test_locks_that_other_threads_hold_are_new_in_the_child(backbone: Backbone, tmp_path: Path) -> None:
    """Every lock of an engine: the fork comes while another thread has all of them."""
    with Engine(backbone, method="query_guided", store=tmp_path, fuse_when_idle=True) as engine:
        engine.ensure(PASSAGES[:2])
        expected = engine.generate(PROMPT, max_new_tokens=4).ids
        ready, go = threading.Event(), threading.Event()
        locks = [
            lock
            for part in forks._parts(engine, set())
            for lock in vars(part).values()
            if type(lock) in (forks._LOCK, forks._RLOCK)
        ]
        assert len(locks) > 10

        def hold() -> None:
            for lock in locks:
                lock.acquire()
            ready.set()
            assert go.wait(120)
            for lock in locks:
                lock.release()

        thread = threading.Thread(target=hold)
        thread.start()
        assert ready.wait(120)

        def works() -> None:
            assert engine.generate(PROMPT, max_new_tokens=4).ids == expected
            engine.ensure(PASSAGES[2:])
            engine.ensure_later(PASSAGES[2:])
            engine.flush()
            engine.forget(PASSAGES)
            engine.stats()
            engine.close()

        try:
            assert child(works) == "ok"
        finally:
            go.set()
            thread.join()


def test_a_fork_waits_for_the_model(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:
        inside, forking, done = threading.Event(), threading.Event(), []

        def compute() -> None:
            with engine.lock:
                inside.set()
                assert forking.wait(120)
                while not engine.lock.waiting:
                    pass
                done.append("computed")

        def works() -> None:
            assert done == ["computed"] and engine.lock.idle

        thread = threading.Thread(target=compute)
        thread.start()
        assert inside.wait(120)
        forking.set()
        assert child(works) == "ok"
        thread.join()
        assert engine.lock.idle


def test_a_model_that_computes_for_too_long_is_refused_in_the_child(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "PATIENCE", 0.01)
    with Engine(backbone, method="query_guided") as engine:
        inside, go = threading.Event(), threading.Event()

        def compute() -> None:
            with engine.lock:
                inside.set()
                assert go.wait(120)

        def works() -> None:
            with pytest.raises(ConfigurationError, match="computing in another thread"):
                engine.generate(PROMPT, max_new_tokens=1)
            result = engine.ensure(PASSAGES[:1])
            assert "after the fork" in result.skipped[0][1]
            engine.ensure_later(PASSAGES[:1])
            engine.flush()
            engine.close()

        thread = threading.Thread(target=compute)
        thread.start()
        assert inside.wait(120)
        try:
            assert child(works) == "ok"
        finally:
            go.set()
            thread.join()
        assert engine.generate(PROMPT, max_new_tokens=1).ids  # the parent's goes on


def test_a_fork_inside_of_a_computation_waits_for_nothing(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:
        with engine.lock:
            assert child(lambda: None) == "ok"
            assert not engine.lock.idle
        assert engine.lock.idle


def test_an_accelerators_model_is_refused_in_the_child(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:

        class Elsewhere:
            device = torch.device("meta")

        class Refused:
            lock, backbone = engine.lock, Elsewhere()

        refused = Refused()
        forks.watch(refused)

        def works() -> None:
            with pytest.raises(ConfigurationError, match="on meta cannot be used in a forked process; open it after"):
                engine.generate(PROMPT, max_new_tokens=1)

        assert child(works) == "ok"


def test_torchs_threads_did_not_come_along(backbone: Backbone) -> None:
    """Without the mend, the child's first large product waits for threads that are not there."""
    before = torch.get_num_threads()
    with Engine(backbone, method="query_guided"):
        try:
            torch.set_num_threads(2)
            large = torch.ones(600, 600)
            product = large @ large

            def works() -> None:
                assert torch.equal(large @ large, product) and torch.get_num_threads() == 1

            assert child(works) == "ok"
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


def test_an_engine_that_has_gone_forks_nothing(backbone: Backbone) -> None:
    engine = Engine(backbone, method="query_guided")
    watched = len(forks._watched)
    engine.close()
    del engine
    assert len(forks._watched) == watched - 1
    assert child(lambda: None) == "ok"


def test_forks_at_random_moments_of_a_busy_parent(tmp_path: Path) -> None:
    tally = torture_serving.forks(tmp_path, rounds=15)
    print(tally)
    assert tally.good, str(tally)


def test_workers_are_told_in_the_log(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with caplog.at_level(logging.INFO, logger="cacheclip_rag"), Engine(backbone, method="query_guided"):

            def works() -> None:
                assert "one thread here" in caplog.text

            assert child(works) == "ok"
    finally:
        torch.set_num_threads(before)
