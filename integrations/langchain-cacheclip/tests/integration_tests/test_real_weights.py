"""What a random model cannot show: LangChain's tests of understanding, on weights that were pulled before."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_cacheclip import ChatCacheClip
from langchain_core.messages import HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_tests.integration_tests import ChatModelIntegrationTests
from tiny import PASSAGES

from cacheclip_rag.weights.pull import is_pulled

MODEL = "qwen2.5-coder-0.5b-instruct"

pytestmark = [
    pytest.mark.skipif(not is_pulled(MODEL), reason=f"cacheclip pull {MODEL} fetches 0.5 GB"),
    pytest.mark.timeout(1800),
]


class Suite(ChatModelIntegrationTests):
    __test__ = False

    @property
    def chat_model_class(self) -> type[ChatCacheClip]:
        return ChatCacheClip


@pytest.fixture(scope="module")
def qwen() -> Iterator[ChatCacheClip]:
    llm = ChatCacheClip(MODEL, max_tokens=100)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    "name",
    [
        "test_tool_calling",
        "test_tool_calling_async",
        "test_agent_loop",
        "test_unicode_tool_call_integration",
    ],
)
async def test_langchains_own(qwen: ChatCacheClip, name: str) -> None:
    result: Any = getattr(Suite(), name)(qwen)
    if inspect.isawaitable(result):
        await result


def test_an_answer_from_reused_chunks(qwen: ChatCacheClip) -> None:
    qwen.engine.ensure(PASSAGES)
    context = "\n\n".join(PASSAGES[:3])
    question = f"{context}\n\nWho built the lighthouse at Cape Morrow? Answer with the name only."
    answer = (qwen | StrOutputParser()).invoke([HumanMessage(question)], recompute_ratio=0.3)
    report = qwen.last_report()
    assert "Lindqvist" in answer
    assert report is not None and report.reused > report.recomputed > 0
