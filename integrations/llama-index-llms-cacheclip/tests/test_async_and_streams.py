"""The event loop stays free, and streams that nobody reads to the end let go of the engine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.base.llms.types import ChatMessage
from llama_index.llms.cacheclip import CacheClipLLM

from cacheclip_rag import Engine
from cacheclip_rag.serving import limit

LONG = 3000
"""Tokens: far more than the tiny model decodes before a cancelled request is noticed."""


@pytest.mark.behaviour("LlamaIndex", "the event loop stays free")
@pytest.mark.parametrize("ask", ["acomplete", "achat", "astream_complete", "astream_chat"])
async def test_the_event_loop_stays_free(
    llm: CacheClipLLM, engine: Engine, ask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model computes only after the loop has gone round: on the loop's own thread it would wait in vain."""
    went_round, waited, threads = threading.Event(), [], set()
    forward = engine.backbone.forward

    def gated(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.get_ident())
        waited.append(went_round.wait(20))
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.backbone, "forward", gated)

    async def answer() -> None:
        result = await getattr(llm, ask)([ChatMessage("Hello.")] if "chat" in ask else "Hello.")
        if "stream" in ask:
            async for _ in result:
                pass

    task = asyncio.create_task(answer())
    ticks = 0
    while not threads and not task.done():  # until the model has been reached
        await asyncio.sleep(0)
        ticks += 1
    went_round.set()
    await task
    assert all(waited) and ticks and threading.get_ident() not in threads


@pytest.mark.behaviour("LlamaIndex", "cancellation: streams left early, calls cancelled; nothing is left behind")
@pytest.mark.parametrize("ask", ["stream_complete", "stream_chat"])
def test_closing_a_stream_ends_its_request(llm: CacheClipLLM, engine: Engine, recorder: Any, ask: str) -> None:
    calls, question = recorder(engine), [ChatMessage("Go on.")] if "chat" in ask else "Go on."
    expected = llm.complete("Next.").text
    stream = getattr(llm, ask)(question, max_new_tokens=LONG)
    next(stream)
    stream.close()
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and 0 < report.completion_tokens < 10
    assert engine.limit.in_flight == 0
    assert llm.complete("Next.").text == expected


@pytest.mark.behaviour("LlamaIndex", "cancellation: streams left early, calls cancelled; nothing is left behind")
@pytest.mark.parametrize("ask", ["astream_complete", "astream_chat"])
@pytest.mark.parametrize("how", ["aclose", "break", "cancel"])
async def test_leaving_an_async_stream_ends_its_request(
    llm: CacheClipLLM, engine: Engine, recorder: Any, ask: str, how: str
) -> None:
    calls, question = recorder(engine), [ChatMessage("Go on.")] if "chat" in ask else "Go on."
    expected = (await llm.acomplete("Next.")).text
    calls.closed.clear()
    started = asyncio.Event()

    async def read() -> None:
        stream = await getattr(llm, ask)(question, max_new_tokens=LONG)
        async for _ in stream:
            started.set()
            if how == "break":
                break
            if how == "aclose":
                await stream.aclose()

    task = asyncio.create_task(read())
    await started.wait()
    if how == "cancel":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    del task
    assert await asyncio.to_thread(calls.closed.wait, 60)
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and report.completion_tokens < LONG
    assert (await llm.acomplete("Next.")).text == expected


@pytest.mark.behaviour("LlamaIndex", "cancellation: streams left early, calls cancelled; nothing is left behind")
async def test_cancelling_a_call_ends_its_request(llm: CacheClipLLM, engine: Engine, recorder: Any) -> None:
    calls, decoding, finished = recorder(engine), asyncio.Event(), threading.Event()
    loop, generate = asyncio.get_running_loop(), engine.backbone.generate

    def noticed(*args: Any, **kwargs: Any) -> Any:
        loop.call_soon_threadsafe(decoding.set)
        try:
            yield from generate(*args, **kwargs)
        finally:
            finished.set()

    engine.backbone.generate = noticed  # type: ignore[method-assign]
    try:
        task = asyncio.create_task(llm.acomplete("Go on.", max_new_tokens=LONG, min_new_tokens=LONG))
        await decoding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(finished.wait, 60)
    finally:
        del engine.backbone.generate
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and report.completion_tokens < LONG


@pytest.mark.behaviour("LlamaIndex", "calls inside a stream do not wait for it")
@pytest.mark.timeout(120)
async def test_a_call_inside_a_stream_does_not_wait_for_it(llm: CacheClipLLM) -> None:
    outer, inner = llm.complete("Outer.").text, llm.complete("Inner.").text
    text = ""
    for piece in llm.stream_complete("Outer."):
        assert llm.complete("Inner.").text == inner
        text = piece.text
    assert text == outer
    async for piece in await llm.astream_complete("Outer."):
        assert (await llm.acomplete("Inner.")).text == inner
        text = piece.text
    assert text == outer


@pytest.mark.behaviour("LlamaIndex", "one object serves several event loops")
def test_one_llm_serves_several_event_loops(llm: CacheClipLLM) -> None:
    async def read() -> str:
        text = ""
        async for piece in await llm.astream_complete("Hello."):
            text = piece.text
        return text

    assert len({asyncio.run(read()) for _ in range(3)} | {llm.complete("Hello.").text}) == 1


@pytest.mark.behaviour("LlamaIndex", "errors reach the caller and the callbacks, and the next request is served")
async def test_an_error_in_the_middle_of_a_stream_reaches_the_reader(
    llm: CacheClipLLM, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        yield 100
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backbone, "generate", broken)
        with pytest.raises(RuntimeError, match="device"):
            [_ async for _ in await llm.astream_complete("Hello.")]
    assert llm.complete("Hello.").text


@pytest.mark.behaviour("LlamaIndex", "50 at once, tasks and threads: the answers of one after another")
async def test_fifty_at_once_get_the_answers_of_one_after_another(informed: Engine, prompt: str) -> None:
    llm = CacheClipLLM.from_engine(informed, max_new_tokens=4)
    prompts = [f"{prompt}[{i}]" for i in range(50)]
    expected = [llm.complete(p).text for p in prompts]

    async def streamed(p: str) -> str:
        return [piece.text async for piece in await llm.astream_complete(p)][-1]

    ways = [llm.acomplete, streamed]
    answers = await asyncio.gather(*[ways[i % 2](p) for i, p in enumerate(prompts)])
    assert [str(answer) for answer in answers] == expected
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(lambda p: llm.complete(p).text, prompts)) == expected
    assert informed.limit.in_flight == 0


@pytest.mark.behaviour("LlamaIndex", "a limit on requests in flight; those that wait can be cancelled")
async def test_a_call_that_waits_can_be_cancelled(tiny_backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))  # the open stream passes for one that is being read
    with Engine(tiny_backbone, method="query_guided", max_requests=1) as engine:
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=4)
        expected = llm.complete("Next.").text
        open_one = llm.stream_complete("First.", max_new_tokens=LONG)
        next(open_one)
        waiting = [asyncio.create_task(llm.acomplete("Next.")) for _ in range(3)]
        while engine.limit.waiting < 3:
            await asyncio.sleep(0.001)
        waiting[0].cancel()
        while engine.limit.waiting > 2:
            await asyncio.sleep(0.001)
        open_one.close()
        first, *others = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError) and [str(other) for other in others] == [expected] * 2


def test_more_streams_are_zipped_than_may_be_in_flight(tiny_backbone: Any) -> None:
    with Engine(tiny_backbone, method="query_guided", max_requests=2) as engine:
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=4)
        rows: list[Any] = []
        reading = threading.Thread(
            target=lambda: rows.extend(zip(*[llm.stream_complete(f"Hello {i}.") for i in range(6)], strict=False)),
            daemon=True,
        )
        reading.start()
        reading.join(120)
        assert not reading.is_alive() and rows and len(rows[0]) == 6
        assert llm.complete("Next.").text


def test_a_seed_gives_the_same_answer(llm: CacheClipLLM) -> None:
    first, second, other = (llm.complete("Hello.", temperature=2.0, seed=seed).text for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.behaviour("LlamaIndex", "a seed on the object: sampled answers are the same, one after another or at once")
async def test_a_seed_of_the_llm_holds_at_once(engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=12, temperature=2.0, seed=7)
    prompts = [f"Hello {i % 4}." for i in range(8)]
    expected = [llm.complete(prompt).text for prompt in prompts]
    assert expected[:4] == expected[4:] and len(set(expected)) == 4
    assert [llm.complete(prompt).text for prompt in reversed(prompts)] == expected[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: llm.complete(prompt).text, prompts)) == expected
    assert [answer.text for answer in await asyncio.gather(*map(llm.acomplete, prompts))] == expected
    assert llm.complete(prompts[0], seed=8).text != expected[0]  # a call's own stands above it
    unseeded = CacheClipLLM.from_engine(engine, max_new_tokens=12, temperature=2.0)
    assert unseeded.complete(prompts[0]).text != unseeded.complete(prompts[0]).text
