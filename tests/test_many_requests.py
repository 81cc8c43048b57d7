"""Many requests to one engine: bounded, fair, and each as if it were alone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.corpus import corpus
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.serving import limit


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def prompts(count: int) -> list[str]:
    """Different chunks in different order, some alike."""
    return [
        f"{PASSAGES[i % 5]}\n\n{PASSAGES[(i * 3 + 1) % 5]}\n\nQuestion {i % 30}: what does it say?"
        for i in range(count)
    ]


def test_fifty_at_once_get_the_answers_of_one_after_another(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(backbone, method="query_guided", max_requests=8) as engine:
        engine.ensure(PASSAGES)
        asked = prompts(50)
        expected = [engine.generate(prompt, max_new_tokens=6).ids for prompt in asked]
        most, forward = [0], backbone.computer.forward_one

        def watched(*arguments: Any, **options: Any) -> Any:
            most[0] = max(most[0], engine.limit.in_flight)
            return forward(*arguments, **options)

        monkeypatch.setattr(backbone.computer, "forward_one", watched)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda prompt: engine.generate(prompt, max_new_tokens=6), asked))
        assert [answer.ids for answer in answers] == expected
        assert all(len(answer.report.chunks) == 2 and not answer.report.fallbacks for answer in answers)
        assert 1 < most[0] <= 8 and engine.limit.in_flight == 0


def test_requests_interleave_at_decoding_steps(backbone: Backbone) -> None:
    """A short answer does not wait for a long one that began before it."""
    with Engine(backbone, method="query_guided") as engine:
        alone = engine.generate("Short.", max_new_tokens=2).ids
        with engine.stream("Long.", max_new_tokens=3000, min_new_tokens=3000) as long:
            next(long)
            assert engine.generate("Short.", max_new_tokens=2).ids == alone
            assert len(long.ids) < 3000


def test_a_stream_that_is_read_keeps_its_place_until_it_is_closed(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))  # the stream passes for one that is being read
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        expected = engine.generate("Next.", max_new_tokens=2).ids
        first = engine.stream("First.", max_new_tokens=50, min_new_tokens=50)
        next(first)
        answers: list[Any] = []
        waiting = threading.Thread(target=lambda: answers.append(engine.generate("Next.", max_new_tokens=2)))
        waiting.start()
        while not engine.limit.waiting:
            waiting.join(0.001)
        assert not answers
        first.close()
        waiting.join(60)
        assert answers[0].ids == expected and engine.limit.in_flight == 0


def test_a_request_that_waits_can_be_cancelled(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))  # the stream passes for one that is being read
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        with engine.stream("First.", max_new_tokens=50) as first:
            next(first)
            cancel = threading.Event()
            results: list[Any] = []
            waiting = threading.Thread(target=lambda: results.append(engine.generate("Next.", cancel=cancel)))
            waiting.start()
            while not engine.limit.waiting:
                waiting.join(0.001)
            cancel.set()
            waiting.join(60)
            assert results[0].text == "" and results[0].report.finish_reason == "cancelled"
        assert engine.limit.in_flight == 0 and engine.generate("Next.", max_new_tokens=2).ids


def test_an_error_gives_the_place_back(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.backbone, "generate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("gone")))
            with pytest.raises(RuntimeError, match="gone"):
                engine.generate("First.")
        assert engine.limit.in_flight == 0 and engine.generate("Next.", max_new_tokens=2).ids


def test_no_places_at_all_make_no_engine(backbone: Backbone) -> None:
    with pytest.raises(ConfigurationError, match="max_requests"):
        Engine(backbone, method="query_guided", max_requests=0)


# ---- streams that nobody reads ------------------------------------------------------------------------------------


def ends(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, done on a thread that must come to an end."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(120)
    assert not thread.is_alive(), "dead lock"
    return result[0]


def test_one_thread_reads_more_streams_in_turn_than_may_be_in_flight(backbone: Backbone) -> None:
    """As ``zip`` does; every answer is the one that the prompt gets alone, and the places come back."""
    with Engine(backbone, method="query_guided", max_requests=3) as engine:
        asked = [f"Question {i}?" for i in range(8)]
        expected = [engine.generate(prompt, max_new_tokens=5, min_new_tokens=5).ids for prompt in asked]
        streams = [engine.stream(prompt, max_new_tokens=5, min_new_tokens=5) for prompt in asked]
        rows = ends(lambda: list(zip_longest(*streams)))
        assert len(rows) >= 2 and [tuple(stream.ids) for stream in streams] == expected
        assert engine.stats().in_flight == engine.stats().waiting == 0
        assert engine.generate("Next.", max_new_tokens=2).ids


def test_a_pool_smaller_than_the_streams_steps_them_all(backbone: Backbone) -> None:
    """As LangChain's ``RunnableParallel.stream`` does: the next step of each is a task of its own, in the pool's order,
    so that threads which wait for a place hold up the streams that have one.
    """
    with Engine(backbone, method="query_guided", max_requests=2) as engine, ThreadPoolExecutor(2) as pool:

        def step_all() -> list[tuple[int, ...]]:
            streams = [engine.stream(f"Question {i}?", max_new_tokens=4) for i in range(6)]
            left = {pool.submit(next, stream, None): stream for stream in streams}
            while left:
                done, _ = wait(left, return_when=FIRST_COMPLETED)
                for future in done:
                    stream = left.pop(future)
                    if future.result() is not None:
                        left[pool.submit(next, stream, None)] = stream
            return [tuple(stream.ids) for stream in streams]

        assert ends(step_all) == [engine.generate(f"Question {i}?", max_new_tokens=4).ids for i in range(6)]
        assert engine.limit.in_flight == 0


def test_streams_left_open_block_nobody(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided", max_requests=2) as engine:
        left = [engine.stream("Left.", max_new_tokens=50, min_new_tokens=50) for _ in range(4)]
        ends(lambda: [next(stream) for stream in left])
        assert engine.limit.in_flight == 4
        assert ends(lambda: engine.generate("Next.", max_new_tokens=2)).ids
        engine.ensure_later(PASSAGES[:1])
        ends(engine.flush)  # nor does work in the background wait for them
        assert engine.knows(PASSAGES[0])
        for stream in left:
            stream.close()
        assert engine.limit.in_flight == 0


def test_the_limit_holds_while_streams_are_read(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", 60.0)  # on a machine this busy, a reader may not come for a while
    with Engine(backbone, method="query_guided", max_requests=3) as engine, ThreadPoolExecutor(12) as pool:
        most = [0]

        def read(number: int) -> int:
            for _ in engine.stream(f"Question {number}?", max_new_tokens=6, min_new_tokens=6):
                most[0] = max(most[0], engine.limit.in_flight)
            return number

        assert list(pool.map(read, range(12))) == list(range(12)) and 1 <= most[0] <= 3


# ---- closing ------------------------------------------------------------------------------------------------------


def test_a_stream_is_closed_from_another_thread_while_it_is_read(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        stream, begun = engine.stream("Long.", max_new_tokens=3000, min_new_tokens=3000), threading.Event()

        def read() -> int:
            for _ in stream:
                begun.set()
            return len(stream.ids)

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            assert begun.wait(120)
            stream.close()  # does not raise
            stream.close()
            assert reading.result(120) < 3000
        assert stream.report.finish_reason == "cancelled" and engine.limit.in_flight == 0
        assert engine.generate("Next.", max_new_tokens=2).ids


def test_a_stream_is_closed_while_it_computes(backbone: Backbone) -> None:
    """By what runs inside of ``next``: a stopping criterion, a signal handler."""
    with Engine(backbone, method="query_guided", max_requests=1) as engine:

        def criterion(ids: Any, scores: Any, **_: Any) -> Any:
            stream.close()
            return torch.zeros(1, dtype=torch.bool)

        stream = engine.stream("Long.", max_new_tokens=50, min_new_tokens=50, stopping_criteria=[criterion])
        assert list(stream) == [] and engine.limit.in_flight == 0


def test_a_stream_that_waits_for_its_place_is_closed(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))
    with Engine(backbone, method="query_guided", max_requests=1) as engine, ThreadPoolExecutor(1) as pool:
        first, second = engine.stream("First.", max_new_tokens=50, min_new_tokens=50), engine.stream("Second.")
        next(first)
        reading = pool.submit(list, second)
        while not engine.limit.waiting:
            assert not reading.done()
        second.close()
        assert reading.result(120) == [] and engine.limit.waiting == 0
        first.close()


def test_an_engine_closes_with_a_stream_open(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits in the background is dropped; it does not wait for the stream."""
    monkeypatch.setattr(corpus, "_WAIT", float("inf"))
    monkeypatch.setattr(limit, "REST", float("inf"))
    with Engine(backbone, method="query_guided") as engine:
        stream = engine.stream("Open.", max_new_tokens=50, min_new_tokens=50)
        next(stream)
        engine.ensure_later(PASSAGES[:1])
        while not engine.corpus.background.busy:
            pass
        ends(engine.close)
        assert not engine.knows(PASSAGES[0])
        stream.close()
        engine.ensure_later(PASSAGES[:1])
        ends(engine.flush)
        assert engine.knows(PASSAGES[0])


def test_the_interpreter_ends_with_a_stream_open() -> None:
    script = """
from tiny import PASSAGES, tiny_backbone
from cacheclip_rag import Engine
from cacheclip_rag.corpus import corpus
from cacheclip_rag.serving import limit
corpus._WAIT = limit.REST = float("inf")
engine = Engine(tiny_backbone(), method="query_guided")
stream = engine.stream("Open.", max_new_tokens=50, min_new_tokens=50)
next(stream)
engine.ensure_later(PASSAGES[:1])
while not engine.corpus.background.busy:
    pass
print("ended")
"""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (ended.returncode, ended.stdout) == (0, "ended\n"), ended.stderr


# ---- seeds --------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_answer_whatever_is_sampled_meanwhile(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:
        options: Any = {"temperature": 2.0, "max_new_tokens": 12, "min_new_tokens": 12}
        alone = [engine.generate("Say something.", seed=seed, **options).ids for seed in range(8)]
        assert len(set(alone)) == 8
        with ThreadPoolExecutor(16) as pool:
            others = [pool.submit(engine.generate, f"Other {i}.", **options) for i in range(8)]
            again = list(pool.map(lambda seed: engine.generate("Say something.", seed=seed, **options).ids, range(8)))
            assert again == alone and all(other.result().ids for other in others)
        streams = [engine.stream("Say something.", seed=seed, **options) for seed in range(8)]
        list(zip_longest(*streams))  # a token of each in turn
        assert [tuple(stream.ids) for stream in streams] == alone


def test_a_seed_leaves_the_global_generator_alone(backbone: Backbone) -> None:
    with Engine(backbone, method="query_guided") as engine:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        engine.generate("Say something.", seed=1, temperature=1.0, max_new_tokens=4)
        assert torch.equal(torch.rand(1), expected)
        greedy = engine.generate("Say something.", max_new_tokens=4).ids
        assert engine.generate("Say something.", seed=1, max_new_tokens=4).ids == greedy


@pytest.mark.parametrize("seed", ["7", 1.5, True, 1 << 64, -(1 << 63) - 1])
def test_a_seed_is_a_whole_number(backbone: Backbone, seed: Any) -> None:
    with Engine(backbone, method="query_guided") as engine, pytest.raises(ConfigurationError, match="seed"):
        engine.stream("Say something.", seed=seed)


@pytest.mark.parametrize("seed", [0, -1, -(1 << 63), (1 << 64) - 1])
def test_any_seed_of_64_bits_will_do(backbone: Backbone, seed: int) -> None:
    with Engine(backbone, method="query_guided") as engine:
        assert engine.generate("Say something.", seed=seed, temperature=1.0, max_new_tokens=2).ids
