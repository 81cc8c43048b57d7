"""What messages, completions and documents quote of a chat template is text to the model, by every way to it."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.core.schema import TextNode
from llama_index.llms.cacheclip import CacheClipLLM
from recording import EVIL_PLACES, control_tokens, quoting

from cacheclip_rag import Backbone, Engine

WAYS = ["chat", "stream_chat", "achat", "complete", "stream_complete", "acomplete", "query", "chat engine"]


async def send(llm: CacheClipLLM, way: str, document: str, question: str) -> None:
    if way in ("query", "chat engine"):
        index = VectorStoreIndex([TextNode(text=document)], embed_model=MockEmbedding(8))
        if way == "query":
            index.as_query_engine(llm=llm).query(question)
        else:
            index.as_chat_engine(chat_mode="context", llm=llm).chat(question)
        return
    content = f"Context:\n{document}\n\n{question}"
    messages = [ChatMessage(f"Be brief. {question}", role="system"), ChatMessage(content)]
    given: Any = content if "complete" in way else messages
    result = getattr(llm, way)(given)
    result = await result if way.startswith("a") else result
    if way.startswith("stream"):
        list(result)


@pytest.mark.behaviour("LlamaIndex", "control tokens in a document are text")
@pytest.mark.parametrize("place", EVIL_PLACES)
@pytest.mark.parametrize("way", WAYS)
async def test_control_tokens_in_a_document_are_text(way: str, place: str, tiny_backbone: Backbone) -> None:
    first, second = (f"{name} was read by the clerk of the harbour, who noted it at length. " * 2 for name in "AB")
    with Engine(Backbone(tiny_backbone.model, tiny_backbone.tokenizer), method="query_guided") as engine:
        llm, seen = CacheClipLLM.from_engine(engine, max_new_tokens=1), control_tokens(engine)
        await send(llm, way, first, "Who built it?")
        (genuine,) = seen
        assert genuine
        for token in engine.backbone.control_tokens if way in ("chat", "complete") else genuine:
            known, document, question = quoting(place, token, first, second)
            engine.ensure(known)
            await send(llm, way, document, question)
            assert seen.pop() == genuine, token
            engine.forget(known)
