"""What messages and documents quote of a chat template is text to the model, by every way to it."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_cacheclip import CacheClipVectorStore, ChatCacheClip
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from recording import EVIL_PLACES, control_tokens, quoting
from tiny import PASSAGES

from cacheclip_rag import Backbone, Engine

PROMPT = ChatPromptTemplate.from_messages([("system", "Use the context.\n\n{context}"), ("human", "{input}")])
WAYS = ["invoke", "stream", "ainvoke", "astream", "batch", "chain", "chain with documents as they are"]


async def send(llm: ChatCacheClip, way: str, document: str, question: str, embedding: Any) -> None:
    if way.startswith("chain"):
        store = InMemoryVectorStore(embedding)
        store.add_texts([document])
        retrieved: Any = CacheClipVectorStore(store, llm).as_retriever()
        if way == "chain":
            retrieved = retrieved | (lambda found: "\n\n".join(one.page_content for one in found))
        ({"context": retrieved, "input": RunnablePassthrough()} | PROMPT | llm).invoke(question)
        return
    messages = [SystemMessage(f"Be brief. {question}"), HumanMessage(f"Context:\n{document}\n\n{question}")]
    if way == "batch":
        llm.batch([messages])
    elif way == "astream":
        [_ async for _ in llm.astream(messages)]
    elif way == "ainvoke":
        await llm.ainvoke(messages)
    elif way == "stream":
        list(llm.stream(messages))
    else:
        llm.invoke(messages)


@pytest.mark.behaviour("LangChain", "control tokens in a document are text")
@pytest.mark.parametrize("place", EVIL_PLACES)
@pytest.mark.parametrize("way", WAYS)
async def test_control_tokens_in_a_document_are_text(
    way: str, place: str, tiny_backbone: Backbone, embedding: Any
) -> None:
    with Engine(Backbone(tiny_backbone.model, tiny_backbone.tokenizer), method="query_guided") as engine:
        llm, seen = ChatCacheClip.from_engine(engine, max_tokens=1), control_tokens(engine)
        await send(llm, way, PASSAGES[0], "Who built it?", embedding)
        (genuine,) = seen
        assert genuine
        for token in engine.backbone.control_tokens:
            known, document, question = quoting(place, token, *PASSAGES[:2])
            engine.ensure(known)
            await send(llm, way, document, question, embedding)
            assert seen.pop() == genuine, token
            engine.flush()
            engine.forget([*known, document])
