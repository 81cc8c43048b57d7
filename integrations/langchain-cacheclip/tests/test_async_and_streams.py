"""The event loop stays free, streams do not block each other, and who leaves early lets go of the engine."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_cacheclip import ChatCacheClip
from langchain_core.runnables import RunnableParallel

from cacheclip_rag import Engine
from cacheclip_rag.serving import limit

LONG = 3000
"""Tokens: far more than the tiny model decodes before a cancelled request is noticed."""


@pytest.mark.behaviour("LangChain", "the event loop stays free")
@pytest.mark.parametrize("ask", ["ainvoke", "astream"])
async def test_the_event_loop_stays_free(
    llm: ChatCacheClip, engine: Engine, ask: str, monkeypatch: pytest.MonkeyPatch
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
        if ask == "ainvoke":
            await llm.ainvoke("Hello.")
        else:
            async for _ in llm.astream("Hello."):
                pass

    task = asyncio.create_task(answer())
    ticks = 0
    while not threads and not task.done():  # until the model has been reached
        await asyncio.sleep(0)
        ticks += 1
    went_round.set()
    await task
    assert all(waited) and ticks and threading.get_ident() not in threads


@pytest.mark.behaviour("LangChain", "cancellation: streams left early, calls cancelled; nothing is left behind")
def test_closing_a_stream_ends_its_request(llm: ChatCacheClip, engine: Engine, recorder: Any) -> None:
    calls = recorder(engine)
    expected = llm.invoke("Next.").text
    stream = llm.stream("Go on.", max_tokens=LONG)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and 0 < report.completion_tokens < 10
    assert engine.limit.in_flight == 0
    assert llm.invoke("Next.").text == expected


@pytest.mark.behaviour("LangChain", "cancellation: streams left early, calls cancelled; nothing is left behind")
@pytest.mark.parametrize("how", ["aclose", "break", "cancel"])
async def test_leaving_an_async_stream_ends_its_request(
    llm: ChatCacheClip, engine: Engine, recorder: Any, how: str
) -> None:
    calls = recorder(engine)
    expected = (await llm.ainvoke("Next.")).text
    calls.closed.clear()
    started = asyncio.Event()

    async def read() -> None:
        stream = llm.astream("Go on.", max_tokens=LONG)
        async for _ in stream:
            started.set()
            if how == "break":
                break
            if how == "aclose":
                await stream.aclose()  # type: ignore[attr-defined]

    task = asyncio.create_task(read())
    await started.wait()
    if how == "cancel":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    del task
    assert await asyncio.to_thread(calls.closed.wait, 60)
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and report.completion_tokens < LONG
    assert (await llm.ainvoke("Next.")).text == expected


@pytest.mark.behaviour("LangChain", "cancellation: streams left early, calls cancelled; nothing is left behind")
async def test_cancelling_a_call_ends_its_request(llm: ChatCacheClip, engine: Engine, recorder: Any) -> None:
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
        task = asyncio.create_task(llm.ainvoke("Go on.", max_tokens=LONG, min_new_tokens=LONG))
        await decoding.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(finished.wait, 60)
    finally:
        del engine.backbone.generate
    report = calls.streams[-1].report
    assert report.finish_reason == "cancelled" and report.completion_tokens < LONG


@pytest.mark.behaviour("LangChain", "calls inside a stream do not wait for it")
@pytest.mark.timeout(120)
async def test_a_call_inside_a_stream_does_not_wait_for_it(llm: ChatCacheClip) -> None:
    outer, inner = llm.invoke("Outer.").text, llm.invoke("Inner.").text
    text = ""
    for piece in llm.stream("Outer."):
        assert llm.invoke("Inner.").text == inner
        text += piece.text
    assert text == outer
    text = ""
    async for piece in llm.astream("Outer."):
        assert (await llm.ainvoke("Inner.")).text == inner
        text += piece.text
    assert text == outer


@pytest.mark.behaviour("LangChain", "one object serves several event loops")
def test_one_model_serves_several_event_loops(llm: ChatCacheClip) -> None:
    async def read() -> str:
        return "".join([piece.text async for piece in llm.astream("Hello.")])

    assert len({asyncio.run(read()) for _ in range(3)} | {llm.invoke("Hello.").text}) == 1


@pytest.mark.behaviour("LangChain", "errors reach the caller and the callbacks, and the next request is served")
async def test_an_error_in_the_middle_of_a_stream_reaches_the_reader(
    llm: ChatCacheClip, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        yield 100
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backbone, "generate", broken)
        with pytest.raises(RuntimeError, match="device"):
            [_ async for _ in llm.astream("Hello.")]
        with pytest.raises(RuntimeError, match="device"):
            list(llm.stream("Hello."))
    assert llm.invoke("Hello.").text


@pytest.mark.behaviour("LangChain", "50 at once, tasks and threads: the answers of one after another")
async def test_fifty_at_once_get_the_answers_of_one_after_another(informed: Engine, prompt: str) -> None:
    llm = ChatCacheClip.from_engine(informed, max_tokens=3)
    prompts = [f"{prompt} [{i}]" for i in range(50)]
    expected = [llm.invoke(p).text for p in prompts]

    async def streamed(p: str) -> Any:
        pieces = [piece async for piece in llm.astream(p)]
        return sum(pieces[1:], pieces[0])

    ways = [llm.ainvoke, streamed]
    answers = await asyncio.gather(*[ways[i % 2](p) for i, p in enumerate(prompts)])
    assert [answer.text for answer in answers] == expected
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(lambda p: llm.invoke(p).text, prompts)) == expected
    assert [answer.text for answer in llm.batch(prompts, config={"max_concurrency": 20})] == expected
    assert informed.limit.in_flight == 0


@pytest.mark.behaviour("LangChain", "a limit on requests in flight; those that wait can be cancelled")
async def test_a_call_that_waits_can_be_cancelled(tiny_backbone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))  # the open stream passes for one that is being read
    with Engine(tiny_backbone, method="query_guided", max_requests=1) as engine:
        llm = ChatCacheClip.from_engine(engine, max_tokens=4)
        expected = llm.invoke("Next.").text
        open_one = llm.stream("First.", max_tokens=LONG)
        next(open_one)
        waiting = [asyncio.create_task(llm.ainvoke("Next.")) for _ in range(3)]
        while engine.limit.waiting < 3:
            await asyncio.sleep(0.001)
        waiting[0].cancel()
        while engine.limit.waiting > 2:
            await asyncio.sleep(0.001)
        open_one.close()
        first, *others = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError) and [o.text for o in others] == [expected] * 2  # type: ignore[union-attr]


@pytest.mark.parametrize("threads", [1, 4])
def test_more_branches_are_streamed_than_may_be_in_flight(tiny_backbone: Any, threads: int) -> None:
    """The pool that steps the branches is smaller than they are many: who waits for a place holds up those with one."""
    with Engine(tiny_backbone, method="query_guided", max_requests=2) as engine:
        llm = ChatCacheClip.from_engine(engine, max_tokens=4)
        chain = RunnableParallel({f"branch {i}": llm.bind(max_tokens=3 + i % 3) for i in range(8)})
        seen: set[str] = set()

        def read() -> None:
            for piece in chain.stream("Hello.", config={"max_concurrency": threads}):
                seen.update(piece)

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(120)
        assert not reading.is_alive() and len(seen) == 8 and engine.limit.in_flight == 0
        assert llm.invoke("Next.").text


def test_a_seed_gives_the_same_answer(llm: ChatCacheClip) -> None:
    sampled = llm.bind(temperature=2.0)
    first, second, other = (sampled.invoke("Hello.", seed=seed).text for seed in (1, 1, 2))
    assert first == second != other
    assert "".join(piece.text for piece in sampled.stream("Hello.", seed=1)) == first


@pytest.mark.behaviour("LangChain", "a seed on the object: sampled answers are the same, one after another or at once")
async def test_a_seed_of_the_model_holds_at_once(engine: Engine) -> None:
    llm = ChatCacheClip.from_engine(engine, max_tokens=12, temperature=2.0, seed=7)
    prompts = [f"Hello {i % 4}." for i in range(8)]
    expected = [llm.invoke(prompt).text for prompt in prompts]
    assert expected[:4] == expected[4:] and len(set(expected)) == 4
    assert [llm.invoke(prompt).text for prompt in reversed(prompts)] == expected[::-1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda prompt: llm.invoke(prompt).text, prompts)) == expected
    assert [answer.text for answer in await asyncio.gather(*map(llm.ainvoke, prompts))] == expected
    assert llm.invoke(prompts[0], seed=8).text != expected[0]  # a call's own stands above it
    unseeded = ChatCacheClip.from_engine(engine, max_tokens=12, temperature=2.0)
    assert unseeded.invoke(prompts[0]).text != unseeded.invoke(prompts[0]).text
