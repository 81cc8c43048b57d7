"""Decoding steps of several streams in one forward: the same answers, nobody waits for anybody else's trouble."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakMethod

import pytest
import torch
from oracles import distance
from threads import PATIENCE, join, start, until
from tiny import CONFIGS, PASSAGES, prompt_of, tiny_backbone
from torch import Tensor

from cacheclip_rag import Engine
from cacheclip_rag.compute import Part
from cacheclip_rag.model import layers as layers_module
from cacheclip_rag.model.backbone import Backbone, CanvasStep
from cacheclip_rag.prefill.result import Prefill
from cacheclip_rag.serving.lock import FairLock
from cacheclip_rag.serving.steps import ROWS, Steps, Stream

METHODS = ["query_guided", "naive", "full", "epic", "ape", "psr", "auto", "query_guided"]


def ready(engine: Engine, count: int) -> list[Prefill]:
    """So many prefilled prompts of different length and method, with whatever is cached of earlier ones."""
    prompts = [prompt_of(engine, PASSAGES[i % 3 :], f"Question {i}?" * (i + 1)) for i in range(count)]
    for _ in range(2):
        prefills = [engine.prefill(text, method=METHODS[i % 8], room=40) for i, text in enumerate(prompts)]
    return prefills


def step(prefill: Prefill, token: int, place: int = 0) -> Part:
    assert isinstance(prefill.step, CanvasStep)
    return prefill.step.part(torch.tensor([token]), len(prefill.layout) + place)


# ---- one forward for several requests -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_rows_of_several_requests_are_computed_as_if_alone(kind: str) -> None:
    engine = Engine(tiny_backbone(kind), method="query_guided")
    engine.ensure(PASSAGES)
    alone, together = ready(engine, 8), ready(engine, 8)
    for place in range(3):
        expected = [one.step(torch.tensor([65 + i]), len(one.layout) + place) for i, one in enumerate(alone)]
        parts = [step(one, 65 + i, place) for i, one in enumerate(together)]
        logits = engine.backbone.computer.steps(parts)
        assert all(distance(a, b) < 1e-4 for a, b in zip(logits, expected, strict=True))


def test_parts_of_several_rows_share_a_forward() -> None:
    engine = Engine(tiny_backbone(), method="query_guided")
    tokens = [torch.tensor([65]), torch.tensor([66, 67, 68]), torch.tensor([69, 70])]
    alone, together = ready(engine, 3), ready(engine, 3)
    expected = [one.step(ids, len(one.layout)) for one, ids in zip(alone, tokens, strict=True)]
    parts = [one.step.part(ids, len(one.layout)) for one, ids in zip(together, tokens, strict=True)]  # type: ignore[attr-defined]
    logits = engine.backbone.computer.steps(parts)
    assert [len(one) for one in logits] == [1, 3, 2]
    assert all(distance(a, b) < 1e-4 for a, b in zip(logits, expected, strict=True))


# ---- who waits for whom -------------------------------------------------------------------------------------------


class Recorded:
    """The forward of `Steps` in tests: notes which parts each pass had, and may fail or wait."""

    def __init__(self, backbone: Backbone) -> None:
        self._run = backbone.computer.steps
        self.passes: list[int] = []
        self.fails: Callable[[Sequence[Part]], BaseException | None] = lambda parts: None

    def __call__(self, parts: Sequence[Part]) -> list[Tensor]:
        self.passes.append(len(parts))
        if (error := self.fails(parts)) is not None:
            raise error
        return self._run(parts)


def test_all_who_wait_are_served_by_one_pass() -> None:
    engine, lock = Engine(tiny_backbone(), method="query_guided"), FairLock()
    run = Recorded(engine.backbone)
    steps = Steps(lock)
    expected = [one.step(torch.tensor([65]), len(one.layout)) for one in ready(engine, 6)]
    prefills, results = ready(engine, 6), dict[int, Tensor]()
    with lock:
        threads = [
            start(lambda i=i: results.__setitem__(i, steps.stream()(step(prefills[i], 65), run)))  # type: ignore[misc]
            for i in range(6)
        ]
        until(lambda: len(steps._waiting) == 6)
    join(*threads)
    assert run.passes == [6] and lock.idle and not steps._waiting
    assert all(distance(results[i], expected[i]) < 1e-4 for i in range(6))


def test_a_step_that_fails_fails_alone() -> None:
    engine, lock = Engine(tiny_backbone(), method="query_guided"), FairLock()
    run = Recorded(engine.backbone)
    steps = Steps(lock)
    prefills, results, errors = ready(engine, 4), dict[int, Tensor](), dict[int, str]()
    bad = prefills[2].canvas
    run.fails = lambda parts: MemoryError("none left") if any(part.workspace is bad for part in parts) else None

    def ask(i: int) -> None:
        try:
            results[i] = steps.stream()(step(prefills[i], 65), run)
        except MemoryError as error:
            errors[i] = str(error)

    with lock:
        threads = [start(lambda i=i: ask(i)) for i in range(4)]  # type: ignore[misc]
        until(lambda: len(steps._waiting) == 4)
    join(*threads)
    assert errors == {2: "none left"} and sorted(results) == [0, 1, 3] and lock.idle


def one_of_four_is_interrupted(engine: Engine, steps: Steps, run: Recorded) -> None:
    """Four streams ask at once; one of them is interrupted, the others get their results."""
    lock, prefills, results, interrupted = steps._lock, ready(engine, 4), dict[int, Tensor](), list[int]()

    def ask(i: int) -> None:
        try:
            results[i] = steps.stream()(step(prefills[i], 65), run)
        except KeyboardInterrupt:
            interrupted.append(i)

    with lock:
        threads = [start(lambda i=i: ask(i)) for i in range(4)]  # type: ignore[misc]
        until(lambda: len(steps._waiting) == 4)
    join(*threads)
    assert len(interrupted) == 1 and len(results) == 3 and lock.idle and not steps._waiting


def test_who_is_interrupted_in_the_middle_of_a_pass_leaves_the_others_theirs() -> None:
    engine = Engine(tiny_backbone(), method="query_guided")
    run = Recorded(engine.backbone)
    steps = Steps(FairLock())
    once = [KeyboardInterrupt()]
    run.fails = lambda parts: once.pop() if once else None

    one_of_four_is_interrupted(engine, steps, run)


def test_who_is_interrupted_while_collecting_the_others_loses_none() -> None:
    engine = Engine(tiny_backbone(), method="query_guided")
    steps, run = Steps(FairLock()), Recorded(engine.backbone)
    once = [KeyboardInterrupt()]

    class Interrupted(dict[Stream, None]):
        """What waits; once, an interrupt comes just after the second stream was taken out."""

        def pop(self, stream: Stream, *default: Any) -> Any:
            found = super().pop(stream, *default)
            if once and len(self) == 2:
                raise once.pop()
            return found

    steps._waiting = Interrupted()

    one_of_four_is_interrupted(engine, steps, run)


def test_a_second_attempt_has_the_memory_of_the_first() -> None:
    """What a failed pass had computed is freed before each stream is computed by itself."""
    engine, lock = Engine(tiny_backbone(), method="query_guided"), FairLock()
    steps, held, alive = Steps(lock), list[weakref.ref[Tensor]](), list[bool]()

    def run(parts: Sequence[Part]) -> Sequence[Tensor]:
        alive.extend(one() is not None for one in held)
        activations = torch.zeros(3)
        held.append(weakref.ref(activations))
        if len(parts) > 1:
            raise MemoryError
        return engine.backbone.computer.steps(parts)

    prefills, results = ready(engine, 2), dict[int, Tensor]()
    with lock:
        threads = [
            start(lambda i=i: results.__setitem__(i, steps.stream()(step(prefills[i], 65), run)))  # type: ignore[misc]
            for i in range(2)
        ]
        until(lambda: len(steps._waiting) == 2)
    join(*threads)
    assert sorted(results) == [0, 1] and not any(alive)


def test_drafts_are_as_long_as_the_rows_that_other_streams_leave() -> None:
    steps = Steps(FairLock())
    streams = [steps.stream() for _ in range(8)]
    assert streams[0].most == ROWS - 1, "nobody has had a token yet"
    for number, stream in enumerate(streams, 1):
        stream.deliver(torch.zeros(1))
        assert streams[0].most == ROWS // number - 1
    for stream in streams[1:]:
        stream.close()
    assert streams[0].most == ROWS - 1


class Steps4:
    """Four steps of a stream, one each time it is run."""

    def __init__(self, prefill: Prefill, results: list[Tensor]) -> None:
        self._prefill, self._results = prefill, results

    def run(self) -> None:
        if len(self._results) < 4:
            row = len(self._prefill.layout) + len(self._results)
            self._results.append(self._prefill.step(torch.tensor([65]), row))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral-sliding", "qwen3"])
def test_streams_go_on_in_the_middle_of_a_prefill_and_neither_changes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(tiny_backbone(kind), method="query_guided", recompute_ratio=0.5, prompt_lookup=0)
    engine.ensure(PASSAGES)
    computer = engine.backbone.computer
    text = prompt_of(engine, PASSAGES)
    for method in ("full", "query_guided", "auto", "ape", "cacheblend"):
        engine.ensure(PASSAGES, method=method)
        stream = ready(engine, 1)[0]
        steps = [stream.step(torch.tensor([65]), len(stream.layout) + place) for place in range(4)]
        again, calls = ready(engine, 1)[0], list[Tensor]()
        expected = [engine.prefill(text, method=method) for _ in range(2)][1]  # with what the first leaves in caches

        other = Steps4(again, calls)
        with monkeypatch.context() as patch:
            patch.setattr(layers_module, "PIECE", 16)
            patch.setattr(computer, "between", WeakMethod(other.run))
            result = engine.prefill(text, method=method)
        assert calls, method
        assert torch.equal(result.logits, expected.logits)
        assert all(distance(a, b) < 1e-4 for a, b in zip(calls, steps, strict=False))


def test_between_two_tokens_of_a_stream_lies_one_piece_of_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: a prefill of n rows is interrupted each time `PIECE` rows of the whole model have been computed."""
    engine = Engine(tiny_backbone(), method="query_guided")
    computer, calls = engine.backbone.computer, list[int]()

    class Other:
        def run(self) -> None:
            calls.append(computer._since)

    other = Other()
    monkeypatch.setattr(layers_module, "PIECE", 64)
    monkeypatch.setattr(computer, "between", WeakMethod(other.run))
    ids = engine.backbone.tokenise("x" * 1000).ids
    engine.backbone.forward(ids, torch.arange(1000), engine.backbone.canvas(1000))
    assert 1000 // 64 // 4 <= len(calls) <= 1000 // 64  # a layer of 1000 rows is 250 of the whole model


def test_long_prompts_are_computed_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in CONFIGS:
        backbone = tiny_backbone(kind)
        ids, rows = backbone.tokenise("".join(PASSAGES)).ids, None
        rows = torch.arange(len(ids))
        whole, pieces = backbone.canvas(len(ids)), backbone.canvas(len(ids))
        expected = backbone.forward(ids, rows, whole, logits=3)
        with monkeypatch.context() as patch:
            patch.setattr(layers_module, "ROWS", 100)
            logits = backbone.forward(ids, rows, pieces, logits=3)
        assert logits is not None and expected is not None
        assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
        assert (pieces.values - whole.values).norm() < 1e-4 * whole.values.norm()


# ---- whole answers ------------------------------------------------------------------------------------------------


def test_eight_streams_take_few_passes_and_get_the_answers_they_get_alone() -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    for method in set(METHODS):  # else they would be encoded at any time between requests
        engine.ensure(PASSAGES, method=method)
    prompts = [prompt_of(engine, PASSAGES[i % 3 :], f"Question {i}?") for i in range(8)]
    options: list[dict[str, Any]] = [{"method": METHODS[i], "max_new_tokens": 20 + i} for i in range(8)]
    options[3] |= {"temperature": 0.5, "seed": 3}
    expected = [engine.generate(text, **one).ids for text, one in zip(prompts, options, strict=True)]
    alone = engine.answering.steps.passes
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda pair: engine.generate(pair[0], **pair[1]).ids, zip(prompts, options, strict=True))
        )
    assert answers == expected
    assert engine.answering.steps.passes - alone < alone, "no two streams ever shared a pass"


def test_one_of_eight_is_cancelled_and_one_is_not_read() -> None:
    engine = Engine(tiny_backbone(), method="query_guided", prompt_lookup=0)
    prompts = [prompt_of(engine, PASSAGES[: 1 + i % 3], f"Question {i}?") for i in range(8)]
    expected = [engine.generate(text, max_new_tokens=30, min_new_tokens=30).ids for text in prompts]
    unread = engine.stream("Nobody reads this.", max_new_tokens=500, min_new_tokens=500)
    next(unread)
    cancel = threading.Event()

    def ask(i: int) -> tuple[int, ...]:
        with engine.stream(
            prompts[i], max_new_tokens=30, min_new_tokens=30, cancel=cancel if i == 5 else None
        ) as stream:
            for _ in stream:
                if i == 5 and len(stream.ids) > 8:
                    cancel.set()
            return tuple(stream.ids)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8), timeout=PATIENCE * 5))
    assert answers[5] == expected[5][: len(answers[5])] and 8 < len(answers[5]) < 30
    assert [one for i, one in enumerate(answers) if i != 5] == [one for i, one in enumerate(expected) if i != 5]
    unread.close()
    assert not engine.answering.steps._streams


def test_streams_of_two_models_wait_together_and_are_computed_by_their_own() -> None:
    engines, lock = [Engine(tiny_backbone(kind), method="query_guided") for kind in ("llama", "qwen3")], FairLock()
    steps, results = Steps(lock), dict[int, Tensor]()
    expected = [ready(engine, 2)[1].step(torch.tensor([65]), len(ready(engine, 2)[1].layout)) for engine in engines]
    prefills = [ready(engine, 2)[1] for engine in engines]

    def ask(i: int) -> None:
        results[i] = steps.stream()(step(prefills[i], 65), engines[i].backbone.computer.steps)

    with lock:
        threads = [start(lambda i=i: ask(i)) for i in range(2)]  # type: ignore[misc]
        until(lambda: len(steps._waiting) == 2)
    join(*threads)
    assert all(distance(results[i], expected[i]) < 1e-4 for i in range(2)) and distance(results[0], results[1]) > 0.1
