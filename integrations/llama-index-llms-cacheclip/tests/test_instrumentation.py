"""Instrumentation: the framework's events once a call, ours beside them, errors where its users look for them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.llms.cacheclip import CacheClipLLM

from cacheclip_rag import Engine, PromptError


class Notes(BaseEventHandler):
    _events: list[Any] = PrivateAttr(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Notes"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self._events.append(event)

    def names(self, part: str) -> list[str]:
        return [event.class_name() for event in self._events if part in event.class_name()]


@pytest.fixture
def notes() -> Iterator[Notes]:
    root, handler = get_dispatcher(), Notes()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


async def ask(llm: CacheClipLLM, how: str) -> None:
    message = [ChatMessage("Hello.")] if "chat" in how else "Hello."
    answer = getattr(llm, how)(message)
    if how.startswith("a"):
        answer = await answer
    if "astream" in how:
        _ = [piece async for piece in answer]
    elif "stream" in how:
        list(answer)


WAYS = [f"{a}{s}{kind}" for kind in ("complete", "chat") for a in ("", "a") for s in ("", "stream_")]


@pytest.mark.behaviour("LlamaIndex", "instrumentation: one pair of events a call, and what was reused")
@pytest.mark.parametrize("how", WAYS)
async def test_events(how: str, llm: CacheClipLLM, notes: Notes) -> None:
    await ask(llm, how)
    kind = "Chat" if "chat" in how else "Completion"
    assert [n for n in notes.names("LLM") if "InProgress" not in n] == [f"LLM{kind}StartEvent", f"LLM{kind}EndEvent"]
    (event,) = [e for e in notes._events if e.class_name() == "CacheClipReuseEvent"]
    assert event.report == llm.last_report().as_dict() and event.report["completion_tokens"] == 6  # type: ignore[union-attr]
    assert event.span_id


@pytest.mark.behaviour("LlamaIndex", "instrumentation: one pair of events a call, and what was reused")
def test_events_of_a_query(llm: CacheClipLLM, passages_index: VectorStoreIndex, notes: Notes) -> None:
    passages_index.as_query_engine(llm=llm).query("Who?")
    assert notes.names("LLMChat") == ["LLMChatStartEvent", "LLMChatEndEvent"]
    assert notes.names("LLMPredict") == ["LLMPredictStartEvent", "LLMPredictEndEvent"]
    assert len(notes.names("CacheClip")) == 1


@pytest.mark.behaviour("LlamaIndex", "cancellation: streams left early, calls cancelled; nothing is left behind")
@pytest.mark.parametrize("how", [way for way in WAYS if "stream" in way])
async def test_a_handler_that_keeps_events_keeps_no_request(
    how: str, llm: CacheClipLLM, engine: Engine, notes: Notes, recorder: Any
) -> None:
    """LlamaIndex tells handlers the exception that a stream was closed with, and its traceback holds the stream."""
    llm.callback_manager = CallbackManager([LlamaDebugHandler(print_trace_on_end=False)])
    calls = recorder(engine)
    stream = getattr(llm, how)([ChatMessage("Go on.")] if "chat" in how else "Go on.", max_new_tokens=3000)
    if how.startswith("a"):
        stream = await stream
        await anext(stream)
        await stream.aclose()
        while not notes.names("CacheClip"):
            await asyncio.sleep(0.01)
    else:
        next(stream)
        stream.close()
    report = calls.streams[0].report
    assert report.finish_reason == "cancelled" and report.completion_tokens < 3000 and notes.names("Exception")
    (event,) = [e for e in notes._events if e.class_name() == "CacheClipReuseEvent"]
    assert event.report["finish_reason"] == "cancelled"


@pytest.mark.behaviour("LlamaIndex", "errors reach the caller and the callbacks, and the next request is served")
@pytest.mark.parametrize("how", WAYS)
async def test_errors(
    how: str, llm: CacheClipLLM, engine: Engine, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.complete("Next.").text
    handler = LlamaDebugHandler(print_trace_on_end=False)
    llm.callback_manager = CallbackManager([handler])

    def broken(*args: Any, **kwargs: Any) -> Any:
        yield 100
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine.backbone, "generate", broken)
        with pytest.raises(RuntimeError, match="device"):
            await ask(llm, how)
    ends = handler.get_event_pairs(CBEventType.LLM)
    assert len(ends) == 1 and isinstance(ends[0][1].payload[EventPayload.EXCEPTION], RuntimeError)  # type: ignore[index]
    assert llm.complete("Next.").text == expected


@pytest.mark.behaviour("LlamaIndex", "errors reach the caller and the callbacks, and the next request is served")
@pytest.mark.parametrize("streaming", [False, True])
def test_errors_of_a_query(
    streaming: bool, narrow_backbone: Any, passages_index: VectorStoreIndex, nodes_of: Any
) -> None:
    """Packing went wrong: the prompt is longer than the window, whatever LlamaIndex was told.

    Its synthesizers take a ValueError for an answer that does not parse, and answer "Empty Response".
    """
    with Engine(narrow_backbone, method="query_guided") as engine:
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=4, context_window=3000)
        expected = llm.complete("Hello.").text
        query_engine = passages_index.as_query_engine(llm=llm, streaming=streaming, similarity_top_k=6)
        with pytest.raises(PromptError, match="context length"):
            response = query_engine.query("Who?")
            list(response.response_gen)  # the stream is opened here at the latest
        assert llm.complete("Hello.").text == expected
