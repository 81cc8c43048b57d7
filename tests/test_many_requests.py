"""Many requests to one engine: bounded, fair, and each as if it were alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.model.backbone import Backbone


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


def test_a_stream_keeps_its_seat_until_it_is_closed(backbone: Backbone) -> None:
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


def test_a_request_that_waits_can_be_cancelled(backbone: Backbone) -> None:
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


def test_an_error_gives_the_seat_back(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(engine.backbone, "generate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("gone")))
            with pytest.raises(RuntimeError, match="gone"):
                engine.generate("First.")
        assert engine.limit.in_flight == 0 and engine.generate("Next.", max_new_tokens=2).ids


def test_no_seats_at_all_make_no_engine(backbone: Backbone) -> None:
    with pytest.raises(ConfigurationError, match="max_requests"):
        Engine(backbone, method="query_guided", max_requests=0)
