"""Exceptions that signal handlers raise: none is lost, and none leaves anything locked."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.interrupts import raised_by_signal
from cacheclip_rag.model.backbone import Backbone

if not hasattr(signal, "setitimer"):
    pytest.skip("timers are Unix's", allow_module_level=True)
import torture_serving

PROMPT = "\n\n".join([*PASSAGES[:2], "Who built it?"])


class Overdue(Exception):
    pass


class Limit:
    def __init__(self, error: type[BaseException] = Overdue) -> None:
        self.error = error

    def raise_it(self, number: int, frame: Any) -> None:
        raise self.error("time is up")

    def __call__(self, number: int, frame: Any) -> None:
        self.raise_it(number, frame)


def with_more(more: str, number: int, frame: Any) -> None:
    raise Overdue(more)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def handle(request: pytest.FixtureRequest) -> Callable[[Any], None]:
    """Install a handler of SIGUSR1 for the test."""
    former = signal.getsignal(signal.SIGUSR1)
    request.addfinalizer(lambda: signal.signal(signal.SIGUSR1, former))
    return lambda handler: signal.signal(signal.SIGUSR1, handler)  # type: ignore[return-value]


def test_interrupts_at_random_moments_lose_nothing() -> None:
    tally = torture_serving.interrupts(200)
    print(tally)
    assert tally.good and tally.inside > 100, str(tally)


@pytest.mark.parametrize(
    "handler", [Limit().raise_it, Limit(), functools.partial(with_more, "more"), lambda n, f: Limit()(n, f)]
)
def test_what_a_handler_raised_is_told_from_what_failed(handle: Callable[[Any], None], handler: Any) -> None:
    handle(handler)
    with pytest.raises(Overdue) as raised:
        signal.raise_signal(signal.SIGUSR1)
    assert raised_by_signal(raised.value)
    try:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Overdue as error:
            raise ValueError from error  # as remote stores do with what they do not know
    except ValueError as wrapped:
        assert raised_by_signal(wrapped)
    try:
        try:
            signal.raise_signal(signal.SIGUSR1)
        except Overdue:
            raise ValueError  # a failure while the caller deals with an interrupt  # noqa: B904
    except ValueError as unrelated:
        assert not raised_by_signal(unrelated)
    try:
        raise Overdue
    except Overdue as own:
        assert not raised_by_signal(own)


@pytest.mark.parametrize("error", [Overdue, TimeoutError, RuntimeError, MemoryError, KeyboardInterrupt])
def test_a_time_limit_ends_the_request_and_not_only_its_reuse(
    backbone: Backbone, handle: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    handle(Limit(error))
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        engine.ensure(PASSAGES[:2])
        expected = engine.generate(PROMPT, max_new_tokens=3).ids

        def interrupted(*arguments: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGUSR1)

        for owner, name in [
            (engine.prefiller.strategies["compose"], "_composer"),  # reuse
            (engine.backbone.computer, "forward_one"),  # a forward
            (engine.corpus, "follow"),  # taking note of other processes
            (engine.usage, "note"),  # what follows a prefill
        ]:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupted)
                with pytest.raises(error, match="time is up"):
                    engine.generate(PROMPT, max_new_tokens=3)
            assert engine.limit.in_flight == 0 and engine.lock.idle
            assert engine.generate(PROMPT, max_new_tokens=3).ids == expected
        assert not engine.stats().fallbacks
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.library.encoder), "encode", interrupted)
            with pytest.raises(error, match="time is up"):
                engine.ensure(PASSAGES[2:])
        engine.observers.append(lambda report: signal.raise_signal(signal.SIGUSR1))
        with pytest.raises(error, match="time is up"):
            engine.generate(PROMPT, max_new_tokens=3)
        engine.observers.clear()
        assert engine.ensure(PASSAGES[2:]).encoded == 3 and engine.generate(PROMPT, max_new_tokens=3).ids


def test_a_failure_of_the_same_class_still_costs_time_only(
    backbone: Backbone, handle: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle(Limit())
    with Engine(backbone, method="query_guided") as engine:
        engine.ensure(PASSAGES[:2])

        def broken(*arguments: Any, **options: Any) -> Any:
            raise Overdue("not by a signal")

        monkeypatch.setattr(engine.prefiller.strategies["compose"], "_composer", broken)
        answer = engine.generate(PROMPT, max_new_tokens=3)
        assert answer.ids and any("Overdue" in line for line in answer.report.fallbacks)


def test_an_interrupted_stream_has_ended(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token may be missing from its text: it must not go on as if there were none."""
    with Engine(backbone, method="query_guided", max_requests=1) as engine:
        stream = engine.stream("Say something.", max_new_tokens=50, min_new_tokens=50)
        next(stream)

        def interrupted(final: bool) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(stream, "_decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        assert engine.limit.in_flight == 0 and list(stream) == []
        assert stream.report.finish_reason == "cancelled"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_an_interrupt_leaves_pytorch_in_its_mode(backbone: Backbone, mode: Any) -> None:
    """PyTorch leaves its modes by a function in Python, which may be interrupted before it has done anything."""

    def trace(frame: Any, event: str, _: Any) -> None:
        if frame.f_code is mode.__exit__.__code__:
            sys.settrace(None)
            raise KeyboardInterrupt

    with Engine(backbone, method="query_guided") as engine:
        engine.ensure(PASSAGES[:2])
        expected = engine.generate(PROMPT, max_new_tokens=3).ids
        sys.settrace(trace)
        kept = None  # as interactive shells keep the last error, and all that it holds with it
        try:
            engine.generate(PROMPT, max_new_tokens=3)
        except KeyboardInterrupt as error:
            kept = error
        finally:
            sys.settrace(None)
        assert (kept is not None) is (mode is torch.no_grad)  # the other one is not used at all
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert engine.generate(PROMPT, max_new_tokens=3).ids == expected
