"""Whatever LangChain builds around the model, the retrieved chunks' KV is found in the prompt."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import dynamic_prompt
from langchain_cacheclip import CacheClipCompressor, CacheClipVectorStore, ChatCacheClip, cacheclip_warm
from langchain_chroma import Chroma
from langchain_classic.chains import create_history_aware_retriever, create_retrieval_chain
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable, RunnableParallel, RunnablePassthrough
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from pydantic import BaseModel
from tiny import PASSAGES

from cacheclip_rag import Backbone, Engine, PromptError

QUESTION = "Who drove the last train of the harbour railway, and what did it carry?"
PROMPT = ChatPromptTemplate.from_messages([("system", "Use the context.\n\n{context}"), ("human", "{input}")])


@pytest.fixture
def store(engine: Engine, embedding: Any, documents_of: Any) -> CacheClipVectorStore:
    """It holds the passages, and the engine knows them."""
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine)
    store.add_documents(documents_of())
    return store


@pytest.fixture
def many(engine: Engine, embedding: Any, documents_of: Any) -> CacheClipVectorStore:
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine)
    store.add_documents(documents_of(40))
    return store


def rag(store: Any, llm: Any, k: int = 2) -> Runnable[str, dict[str, Any]]:
    """A chain written by hand."""

    def joined(found: dict[str, Any]) -> str:
        return "\n\n".join(document.page_content for document in found["context"])

    answer = RunnablePassthrough.assign(context=joined) | PROMPT | llm | StrOutputParser()
    retriever = store.as_retriever(search_kwargs={"k": k})
    return RunnableParallel(context=retriever, input=RunnablePassthrough()).assign(answer=answer)


def retrieval_chain(retriever: Any, llm: Any) -> Runnable[Any, Any]:
    return create_retrieval_chain(retriever, create_stuff_documents_chain(llm, PROMPT))


@pytest.mark.behaviour("LangChain", "every chain (stuff, retrieval, LCEL); sync, async, streaming, batch")
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "astream", "batch", "abatch"])
async def test_every_way_through_a_chain(
    how: str, llm: ChatCacheClip, engine: Engine, store: Any, recorder: Any, keys_of: Any
) -> None:
    calls, chain = recorder(engine), retrieval_chain(store.as_retriever(search_kwargs={"k": 3}), llm)
    given = {"input": QUESTION}
    if how in ("stream", "astream"):
        pieces = list(chain.stream(given)) if how == "stream" else [piece async for piece in chain.astream(given)]
        context = next(piece["context"] for piece in pieces if "context" in piece)
        assert "".join(piece.get("answer", "") for piece in pieces)
    else:
        result = getattr(chain, how)([given] if "batch" in how else given)
        result = await result if how.startswith("a") else result
        context = (result[0] if "batch" in how else result)["context"]
    assert calls.keys() == keys_of(engine, context) and len(context) == 3
    assert calls.streams[0].report.reused and not calls.streams[0].report.fallbacks


@pytest.mark.behaviour("LangChain", "own document prompts and separators")
def test_own_document_prompt_and_separator(
    llm: ChatCacheClip, engine: Engine, store: Any, recorder: Any, keys_of: Any
) -> None:
    documents, calls = store.similarity_search(QUESTION, k=3), recorder(engine)
    chain = create_stuff_documents_chain(
        llm,
        PROMPT,
        document_prompt=PromptTemplate.from_template("[{source}]\n{page_content}"),
        document_separator="\n###\n",
    )
    chain.invoke({"context": documents, "input": QUESTION})
    assert calls.keys() == keys_of(engine, documents) and "[p" in calls.prompts[0]


@pytest.mark.behaviour("LangChain", "branches, retries, fallbacks")
def test_branches_retries_fallbacks(
    llm: ChatCacheClip, engine: Engine, store: Any, recorder: Any, keys_of: Any
) -> None:
    calls, chain = recorder(engine), rag(store, llm)
    both = RunnableParallel(a=chain.with_retry(), b=chain.with_fallbacks([chain])).invoke(QUESTION)
    assert calls.keys() == keys_of(engine, both["a"]["context"]) * 2
    # a model that cannot answer, and the one that stands in for it
    broken = llm.bind(recompute_ratio=7).with_fallbacks([llm])
    calls.clear()
    assert rag(store, broken).invoke(QUESTION)["answer"]
    assert calls.keys() == keys_of(engine, both["a"]["context"])


@pytest.mark.behaviour("LangChain", "20 at once, tasks and threads: each call has its own chunks")
def test_twenty_at_once_get_their_own_chunks(
    llm: ChatCacheClip, engine: Engine, many: Any, recorder: Any, keys_of: Any
) -> None:
    calls, numbers = recorder(engine), range(20)
    questions = [f"Where is parcel P{i * 31 + 11}? [{i}]" for i in numbers]
    results = rag(many, llm).batch(questions, {"max_concurrency": 20})
    assert len(calls) == 20
    for i, result in zip(numbers, results, strict=True):
        assert calls.keys(containing=f"[{i}]") == keys_of(engine, result["context"])
    assert len({tuple(keys_of(engine, result["context"])) for result in results}) > 10


@pytest.mark.behaviour("LangChain", "20 at once, tasks and threads: each call has its own chunks")
async def test_twenty_tasks_get_their_own_chunks(
    llm: ChatCacheClip, engine: Engine, many: Any, recorder: Any, keys_of: Any
) -> None:
    calls, numbers, chain = recorder(engine), range(20), rag(many, llm)
    warmed = RunnablePassthrough() | chain | cacheclip_warm(llm)
    results = await asyncio.gather(*[warmed.ainvoke(f"Where is parcel P{i * 31 + 11}? [{i}]") for i in numbers])
    for i, result in zip(numbers, results, strict=True):
        assert calls.keys(containing=f"[{i}]") == keys_of(engine, result["context"])


@pytest.mark.behaviour("LangChain", "a store that cannot be wrapped: compressor and `cacheclip_warm`")
@pytest.mark.parametrize("how", ["invoke", "ainvoke", "stream", "batch"])
async def test_a_store_that_cannot_be_wrapped(
    how: str, llm: ChatCacheClip, engine: Engine, embedding: Any, documents_of: Any, recorder: Any, keys_of: Any
) -> None:
    """Nothing was encoded at ingestion: the compressor makes up for it, and answers come before and after."""
    inner = InMemoryVectorStore(embedding)
    inner.add_documents(documents_of())
    calls = recorder(engine)
    plain = retrieval_chain(inner.as_retriever(search_kwargs={"k": 3}), llm)
    assert plain.invoke({"input": QUESTION})["answer"] and not calls.keys()

    retriever = ContextualCompressionRetriever(
        base_compressor=CacheClipCompressor(llm, on_miss="encode"),
        base_retriever=inner.as_retriever(search_kwargs={"k": 3}),
    )
    chain, given = retrieval_chain(retriever, llm), {"input": QUESTION}
    calls.clear()
    if how == "stream":
        context = next(piece["context"] for piece in list(chain.stream(given)) if "context" in piece)
    elif how == "batch":
        context = chain.batch([given])[0]["context"]
    else:
        context = (chain.invoke(given) if how == "invoke" else await chain.ainvoke(given))["context"]
    assert calls.keys() == keys_of(engine, context) and len(context) == 3
    calls.clear()
    plain.invoke(given)  # now the model knows them by itself
    assert calls.keys() == keys_of(engine, context)


@pytest.mark.behaviour("LangChain", "nothing known: ordinary prefill, and the postprocessor repairs it")
def test_nothing_known_is_an_ordinary_prefill(llm: ChatCacheClip, engine: Engine, recorder: Any) -> None:
    calls = recorder(engine)
    create_stuff_documents_chain(llm, PROMPT).invoke({"context": [Document(PASSAGES[0])], "input": QUESTION})
    report = calls.streams[0].report
    assert not report.chunks and not report.fallbacks and report.fresh == report.prompt_tokens


@pytest.mark.behaviour("LangChain", "history-aware retrieval")
def test_history(llm: ChatCacheClip, engine: Engine, store: Any, recorder: Any, keys_of: Any) -> None:
    calls = recorder(engine)
    rewrite = ChatPromptTemplate.from_messages([("placeholder", "{chat_history}"), ("human", "Rewrite: {input}")])
    aware = create_history_aware_retriever(llm, store.as_retriever(search_kwargs={"k": 2}), rewrite)
    history = [("human", f"What about this? {PASSAGES[4]}"), ("ai", "A prize.")]
    result = retrieval_chain(aware, llm).invoke({"input": QUESTION, "chat_history": history})
    first, second = calls.streams
    assert [use.key for use in first.report.chunks] == [engine.library.key(PASSAGES[4])]  # context said in an old turn
    assert [use.key for use in second.report.chunks] == keys_of(engine, result["context"])


@pytest.mark.behaviour("LangChain", "agents: chunks in a tool's answer; streaming or not, alone or in a workflow")
def test_an_agent_finds_chunks_in_a_tools_answer(
    engine: Engine, store: Any, recorder: Any, scripted: Any, keys_of: Any
) -> None:
    @tool
    def search_documents(query: str) -> str:
        """Search the documents."""
        found = store.similarity_search(query, k=2)
        return "\n\n".join(f"Source: {document.metadata}\nContent: {document.page_content}" for document in found)

    call = {"name": "search_documents", "arguments": {"query": "harbour railway"}}
    scripted(f"<tool_call>\n{json.dumps(call)}\n</tool_call>", "Marguerite Okafor drove it.")
    calls, llm = recorder(engine), ChatCacheClip.from_engine(engine, max_tokens=200)
    result = create_agent(llm, [search_documents]).invoke({"messages": [("user", QUESTION)]})
    assert result["messages"][-1].text == "Marguerite Okafor drove it."
    assert [message.type for message in result["messages"]] == ["human", "ai", "tool", "ai"]
    assert calls.keys() == keys_of(engine, store.similarity_search("harbour railway", k=2))


@pytest.mark.behaviour("LangChain", "agents: context put in by middleware")
def test_an_agent_that_is_told_the_context(
    plain_engine: Engine, embedding: Any, documents_of: Any, recorder: Any, keys_of: Any
) -> None:
    """LangChain's two-step RAG, which needs no tools of the model."""
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), plain_engine)
    store.add_documents(documents_of())

    @dynamic_prompt
    def context(request: Any) -> str:
        found = store.similarity_search(request.messages[-1].text, k=2)
        return "Context:\n\n" + "\n\n".join(document.page_content for document in found)

    calls, llm = recorder(plain_engine), ChatCacheClip.from_engine(plain_engine, max_tokens=6)
    create_agent(llm, [], middleware=[context]).invoke({"messages": [("user", QUESTION)]})
    assert calls.keys() == keys_of(plain_engine, store.similarity_search(QUESTION, k=2))
    assert not calls.streams[0].report.fallbacks


@pytest.mark.behaviour("LangChain", "structured output: agents and `with_structured_output`")
def test_an_agent_with_structured_answers(engine: Engine) -> None:
    class Answer(BaseModel):
        """The answer."""

        driver: str

    llm = ChatCacheClip.from_engine(engine, max_tokens=120)
    result = create_agent(llm, [], response_format=Answer).invoke({"messages": [("user", QUESTION)]})
    assert isinstance(result["structured_response"], Answer)


@pytest.mark.behaviour("LangChain", "structured output: agents and `with_structured_output`")
def test_structured_output_keeps_the_chunks(engine: Engine, store: Any, recorder: Any, keys_of: Any) -> None:
    class Answer(BaseModel):
        driver: str

    calls, llm = recorder(engine), ChatCacheClip.from_engine(engine, max_tokens=60).with_structured_output(Answer)
    documents = store.similarity_search(QUESTION, k=3)
    context = "\n\n".join(document.page_content for document in documents)
    assert isinstance((PROMPT | llm).invoke({"context": context, "input": QUESTION}), Answer)
    assert calls.keys() == keys_of(engine, documents)


@pytest.mark.behaviour(
    "LangChain", "texts: equal nodes, marks in a text, parents, overlaps, changed metadata, short ones"
)
def test_chunks_inside_a_larger_text_and_overlapping_ones(
    llm: ChatCacheClip, engine: Engine, embedding: Any, recorder: Any
) -> None:
    """A parent of two chunks; chunks that share a part; chunks with blanks around them; one too short to matter."""
    overlap = PASSAGES[0][-90:]
    texts = [PASSAGES[0], overlap + PASSAGES[1], f"  \n{PASSAGES[2]}\n ", "Too short to matter."]
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine)
    store.add_texts(texts)
    calls = recorder(engine)
    parent = f"Chapter one.\n{texts[0]}\nAnd then:\n{texts[1]}\n{texts[2]}\n{texts[3]}"
    llm.invoke(f"{parent}\n{QUESTION}")
    assert calls.keys() == [engine.library.key(text) for text in texts[:3]]


@pytest.mark.behaviour("LangChain", "chunks of another model are misses, not errors")
def test_another_engines_chunks_are_misses(
    engine: Engine, store: Any, backbone_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model, template or prefix is another namespace: nothing fits, and nothing is wrong."""
    with Engine(backbone_of(seed=3), method="query_guided") as other, caplog.at_level(logging.WARNING):
        answer = ChatCacheClip.from_engine(other, max_tokens=4)
        rag(store, answer).invoke(QUESTION)
        report = answer.last_report()
        assert report is not None and not report.chunks and not report.fallbacks
    assert not caplog.records


def test_chroma_gives_back_what_it_was_given(
    llm: ChatCacheClip, engine: Engine, embedding: Any, recorder: Any, keys_of: Any
) -> None:
    texts = [
        PASSAGES[0] + "\r\nÅ tab\tand a \u00a0 blank — 東京 🚂",
        "  leading blanks, and trailing ones: " + PASSAGES[1] + "  ",
    ]
    store = CacheClipVectorStore(Chroma(collection_name="exact", embedding_function=embedding), llm)
    try:
        store.add_texts(texts)
        calls = recorder(engine)
        result = rag(store, llm).invoke("What about 東京?")
        assert sorted(document.page_content for document in result["context"]) == sorted(texts)
        assert calls.keys() == keys_of(engine, result["context"])
    finally:
        store.delete_collection()


def test_structured_output_of_a_model_whose_template_knows_no_system_message(
    backbone_of: Callable[..., Backbone], recorder: Any
) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )

    class Answer(BaseModel):
        good: bool

    with Engine(backbone_of(template), method="query_guided") as engine:
        calls, llm = recorder(engine), ChatCacheClip.from_engine(engine, max_tokens=60)
        assert isinstance(llm.with_structured_output(Answer).invoke("Is it good?"), Answer)
        asked = calls.streams[0].report.token_sources.prompt
        assert asked.startswith("<|im_start|>user\nAnswer with JSON") and "Is it good?<|im_end|>" in asked
        with pytest.raises(PromptError, match="no system"):
            llm.invoke([SystemMessage("Be brief."), HumanMessage("Hello.")])
