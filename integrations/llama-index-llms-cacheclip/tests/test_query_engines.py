"""Whatever LlamaIndex builds around the LLM, the retrieved chunks' KV is found in the prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

from cacheclip_rag import Engine

QUESTION = "Who drove the last train of the harbour railway, and what did it carry?"


MODES = ["compact", "refine", "tree_summarize", "accumulate", "compact_accumulate"]


@pytest.mark.behaviour("LlamaIndex", "every response mode; sync, async, streaming, async streaming")
@pytest.mark.parametrize(
    ("mode", "how"),
    [
        (mode, how)
        for mode in MODES
        for how in ["query", "aquery", "stream", "astream"]
        if "accumulate" not in mode or "stream" not in how  # LlamaIndex does not stream accumulated answers
    ],
)
async def test_every_response_mode(
    mode: str,
    how: str,
    llm: CacheClipLLM,
    engine: Engine,
    passages_index: VectorStoreIndex,
    nodes_of: Any,
    recorder: Any,
    keys_of: Any,
) -> None:
    streaming = "stream" in how
    CacheClipTransform(llm)(nodes_of())
    calls = recorder(engine)
    query_engine = passages_index.as_query_engine(
        llm=llm,
        response_mode=mode,
        streaming=streaming,
        similarity_top_k=3,
        node_postprocessors=[CacheClipPostprocessor(llm, on_miss="ignore")],
    )
    # a synthesizer's own async path is used even where it has only one prompt
    response = query_engine.query(QUESTION) if how in ("query", "stream") else await query_engine.aquery(QUESTION)
    if how == "stream":
        assert "".join(response.response_gen)
    elif how == "astream":
        assert "".join([text async for text in response.async_response_gen()])
    else:
        assert str(response)
    wanted = keys_of(engine, response)
    assert len(wanted) == 3 and all(QUESTION in prompt for prompt in calls.prompts)
    if mode == "accumulate" and how == "aquery":
        assert sorted(calls.keys()) == sorted(wanted)  # it asks about all at once
    else:
        assert calls.keys() == wanted
    assert all(not stream.report.fallbacks and stream.report.reused for stream in calls.streams)


@pytest.mark.behaviour("LlamaIndex", "20 at once, tasks and threads: each call has its own chunks")
async def test_twenty_concurrent_queries_get_their_own_chunks(
    llm: CacheClipLLM, engine: Engine, embedding: Any, nodes_of: Any, recorder: Any, keys_of: Any
) -> None:
    nodes = nodes_of(60)
    CacheClipTransform(engine)(nodes)
    calls = recorder(engine)
    query_engine = VectorStoreIndex(nodes, embed_model=embedding).as_query_engine(
        llm=llm, similarity_top_k=3, node_postprocessors=[CacheClipPostprocessor(llm)]
    )
    numbers = range(20)
    responses = await asyncio.gather(*[query_engine.aquery(f"Where is parcel P{i * 31 + 11}? [{i}]") for i in numbers])
    assert len(calls) == 20
    for i, response in zip(numbers, responses, strict=True):
        assert calls.keys(containing=f"[{i}]") == keys_of(engine, response)
    assert len({tuple(keys_of(engine, response)) for response in responses}) > 10


@pytest.mark.behaviour("LlamaIndex", "settings are all it takes: no postprocessor, no llm handed over")
def test_settings(
    llm: CacheClipLLM,
    engine: Engine,
    passages_index: VectorStoreIndex,
    recorder: Any,
    keys_of: Callable[..., list[str]],
    nodes_of: Callable[..., list[TextNode]],
) -> None:
    """Nothing but the usual globals: no postprocessor, no llm handed over."""
    calls, before = recorder(engine), Settings.tokenizer
    try:
        Settings.llm, Settings.tokenizer = llm, llm.tokenizer_fn
        CacheClipTransform(Settings.llm)(nodes_of())
        response = passages_index.as_query_engine(similarity_top_k=2).query(QUESTION)
    finally:
        Settings._llm, Settings._prompt_helper, Settings.tokenizer = None, None, before
    assert calls.keys() == keys_of(engine, response)


def test_answers_from_real_weights(smollm2: Engine, passages_index: VectorStoreIndex, nodes_of: Any) -> None:
    llm = CacheClipLLM.from_engine(smollm2, max_new_tokens=16, recompute_ratio=0.3)
    CacheClipTransform(llm)(nodes_of())
    query_engine = passages_index.as_query_engine(
        llm=llm, similarity_top_k=2, node_postprocessors=[CacheClipPostprocessor(llm)]
    )
    response = query_engine.query("Who built the lighthouse at Cape Morrow?")
    report = llm.last_report()
    assert "Lindqvist" in str(response)
    assert report is not None and report.reused > report.recomputed > 0 and report.bound > 1.3
