"""What LlamaIndex's instrumentation is told of requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipReuseEvent

from cacheclip_rag import Engine


class Seen(BaseEventHandler):
    events: list[Any] = Field(default_factory=list)
    broken: bool = False

    @classmethod
    def class_name(cls) -> str:
        return "Seen"

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, CacheClipReuseEvent):
            if self.broken:
                raise RuntimeError("the trace server is away")
            self.events.append(event)


@pytest.fixture
def seen() -> Iterator[Seen]:
    handler, root = Seen(events=[]), get_dispatcher()
    root.add_event_handler(handler)
    yield handler
    root.event_handlers.remove(handler)


async def test_each_call_is_told_once(llm: CacheClipLLM, informed: Engine, prompt: str, seen: Seen) -> None:
    llm.complete(prompt)
    list(llm.stream_complete(prompt))
    await llm.acomplete(prompt)
    async for _ in await llm.astream_complete(prompt):
        pass
    assert len(seen.events) == 4
    report = llm.last_report()
    event = seen.events[-1]
    assert report is not None and event.report == report.as_dict()
    assert event.cached_tokens == report.prefix + report.reused
    assert event.recomputed_tokens == report.recomputed > 0
    assert event.cached_tokens + event.recomputed_tokens + event.fresh_tokens == event.prompt_tokens


def test_a_broken_handler_breaks_no_answer(llm: CacheClipLLM, informed: Engine, prompt: str, seen: Seen) -> None:
    seen.broken = True
    assert llm.complete(prompt).raw["cacheclip"]["reused"] > 0
