"""Chat engines, engines made of engines, agents and workflows: they write their own prompts, and chunks are found."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import Settings, VectorStoreIndex, get_response_synthesizer
from llama_index.core.agent.workflow import AgentWorkflow, ReActAgent
from llama_index.core.query_engine import (
    CitationQueryEngine,
    RetryQueryEngine,
    RouterQueryEngine,
    SubQuestionQueryEngine,
    TransformQueryEngine,
)
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.workflow import Context, Event, StartEvent, StopEvent, Workflow, step
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

from cacheclip_rag import Engine


@pytest.fixture
def llm(engine: Engine, nodes_of: Any, monkeypatch: pytest.MonkeyPatch) -> CacheClipLLM:
    """With room for an answer, and the passages known; the global one too, which some engines insist on."""
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=120)
    CacheClipTransform(llm, show_progress=False)(nodes_of())
    monkeypatch.setattr(Settings, "_llm", llm)
    return llm


@pytest.fixture
def query_engine(llm: CacheClipLLM, passages_index: VectorStoreIndex) -> Any:
    return passages_index.as_query_engine(
        llm=llm, similarity_top_k=2, node_postprocessors=[CacheClipPostprocessor(llm, on_miss="ignore")]
    )


@pytest.mark.behaviour("LlamaIndex", "chat engines with history; sync, async, streaming, async streaming")
@pytest.mark.parametrize("how", ["chat", "achat", "stream_chat", "astream_chat"])
@pytest.mark.parametrize("mode", ["context", "condense_plus_context", "condense_question"])
async def test_chat_engines(
    mode: str,
    how: str,
    llm: CacheClipLLM,
    engine: Engine,
    passages_index: VectorStoreIndex,
    recorder: Any,
    keys_of: Any,
    scripted: Any,
) -> None:
    scripted(*[f"Answer {i}." for i in range(8)])
    chat = passages_index.as_chat_engine(
        chat_mode=mode, llm=llm, similarity_top_k=2, node_postprocessors=[CacheClipPostprocessor(llm)]
    )
    calls = recorder(engine)
    for turn, question in enumerate(["Who built the lighthouse?", "And who kept it?", "What does the railway carry?"]):
        calls.clear()
        asked = getattr(chat, how)(question)
        response = await asked if how.startswith("a") else asked
        if how == "stream_chat":
            assert "".join(response.response_gen).startswith("Answer")
        elif how == "astream_chat":
            assert "".join([text async for text in response.async_response_gen()]).startswith("Answer")
        else:
            assert str(response).startswith("Answer")
        last = [use for use in calls.streams[-1].report.chunks if use.missing is None]
        assert len(last) == 2 and all(use.whole for use in last)
        if response.source_nodes:  # LlamaIndex leaves them out of what condense_question streams asynchronously
            assert [use.key for use in last] == keys_of(engine, response)
        assert turn == 0 or "Answer 0." in calls.prompts[0]  # the history is there


@pytest.mark.behaviour("LlamaIndex", "chat engines without retrieval")
def test_simple_chat(llm: CacheClipLLM, engine: Engine, recorder: Any, nodes_of: Any) -> None:
    """What the history says again is recognised as well."""
    from llama_index.core.chat_engine import SimpleChatEngine

    calls = recorder(engine)
    chat = SimpleChatEngine.from_defaults(llm=llm)
    chat.chat(f"Remember this: {nodes_of()[0].text}")
    chat.chat("What was it?")
    assert [len(stream.report.chunks) for stream in calls.streams] == [1, 1]


@pytest.mark.behaviour("LlamaIndex", "sub-question engine; sync and async")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_sub_questions(
    asynchronous: bool, llm: CacheClipLLM, engine: Engine, query_engine: Any, recorder: Any, scripted: Any
) -> None:
    tool = QueryEngineTool.from_defaults(query_engine, name="passages", description="the coast")
    asked = ["Who built the lighthouse?", "What did the railway carry?"]
    items = ", ".join(f'{{"sub_question": "{q}", "tool_name": "passages"}}' for q in asked)
    scripted(f'```json\n{{"items": [{items}]}}\n```', "One.", "Two.", "Both.")
    calls = recorder(engine)
    composed = SubQuestionQueryEngine.from_defaults(
        query_engine_tools=[tool],
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        response_synthesizer=get_response_synthesizer(llm=llm),
        use_async=asynchronous,
        verbose=False,
    )
    answer = await composed.aquery("Tell me all.") if asynchronous else composed.query("Tell me all.")
    assert str(answer) == "Both." and len(calls) == 4
    for question in asked:
        assert len(calls.keys(containing=f"Query: {question}\n")) == 2
    assert not calls.streams[3].report.chunks  # answers to sub-questions are no chunks


@pytest.mark.behaviour("LlamaIndex", "citation engine")
def test_citations(
    llm: CacheClipLLM, engine: Engine, passages_index: VectorStoreIndex, recorder: Any, keys_of: Any
) -> None:
    """It cuts nodes anew and puts "Source 1:" before them: headers are fresh, texts are reused."""
    calls = recorder(engine)
    CitationQueryEngine.from_args(passages_index, llm=llm, similarity_top_k=3).query("Who built the lighthouse?")
    (stream,) = calls.streams
    assert "Source 3:" in calls.prompts[0] and len(stream.report.chunks) == 3
    assert stream.report.reused > 0.5 * stream.report.prompt_tokens - 250


@pytest.mark.behaviour("LlamaIndex", "router engine")
def test_router(llm: CacheClipLLM, engine: Engine, query_engine: Any, recorder: Any, scripted: Any) -> None:
    scripted('[{"choice": 2, "reason": "it is about the coast"}]', "Lindqvist.")
    tools = [
        QueryEngineTool.from_defaults(query_engine, name=name, description=f"about {name}") for name in ("jam", "coast")
    ]
    calls = recorder(engine)
    router = RouterQueryEngine(LLMSingleSelector.from_defaults(llm=llm), tools, llm=llm)
    assert str(router.query("Who built the lighthouse?")) == "Lindqvist."
    assert len(calls) == 2 and len(calls.keys()) == 2


@pytest.mark.behaviour("LlamaIndex", "transformed and retried queries")
def test_transformed_and_retried(
    llm: CacheClipLLM, engine: Engine, query_engine: Any, embedding: Any, recorder: Any, scripted: Any
) -> None:
    from llama_index.core.evaluation import RelevancyEvaluator
    from llama_index.core.indices.query.query_transform import HyDEQueryTransform

    calls = recorder(engine)
    scripted("A lighthouse was built by an engineer.", "Lindqvist.")
    transformed = TransformQueryEngine(query_engine, HyDEQueryTransform(llm=llm, include_original=True))
    assert str(transformed.query("Who built the lighthouse?")) == "Lindqvist."
    assert len(calls.keys()) == 2
    calls.clear()
    scripted("Nobody.", "NO", "Lindqvist.", "YES")
    retried = RetryQueryEngine(query_engine, RelevancyEvaluator(llm=llm), max_retries=1)
    assert str(retried.query("Who built the lighthouse?")) == "Lindqvist."
    assert all(len(stream.report.chunks) == 2 for stream in (calls.streams[0], calls.streams[2]))
    assert calls.streams[1].report.chunks  # the evaluator reads them as well


STEP = 'Thought: I need to use a tool.\nAction: {tool}\nAction Input: {{"input": "Who built the lighthouse?"}}'
END = "Thought: I can answer without using any more tools.\nAnswer: Ada Lindqvist."


@pytest.mark.behaviour("LlamaIndex", "agents: chunks inside a tool's own query")
async def test_an_agent_with_a_query_engine(
    llm: CacheClipLLM, engine: Engine, query_engine: Any, recorder: Any, scripted: Any
) -> None:
    scripted(STEP.format(tool="passages"), "Lindqvist.", END)
    calls = recorder(engine)
    tool = QueryEngineTool.from_defaults(query_engine, name="passages", description="the coast")
    answer = await ReActAgent(tools=[tool], llm=llm).run("Who built the lighthouse?")
    assert "Ada Lindqvist" in str(answer) and len(calls) == 3
    assert [len(stream.report.chunks) for stream in calls.streams] == [0, 2, 0]


@pytest.mark.behaviour("LlamaIndex", "agents: chunks in a tool's answer; streaming or not, alone or in a workflow")
@pytest.mark.parametrize("streaming", [False, True])
async def test_an_agent_with_a_retriever(
    streaming: bool,
    llm: CacheClipLLM,
    engine: Engine,
    passages_index: VectorStoreIndex,
    recorder: Any,
    scripted: Any,
) -> None:
    retriever = passages_index.as_retriever(similarity_top_k=2)

    def look_up(input: str) -> str:
        """Passages about something."""
        return "\n\n".join(found.get_content() for found in retriever.retrieve(input))

    scripted(STEP.format(tool="look_up"), END)
    calls = recorder(engine)
    agent = ReActAgent(
        name="coast", description="knows", tools=[FunctionTool.from_defaults(look_up)], llm=llm, streaming=streaming
    )
    handler = AgentWorkflow(agents=[agent], root_agent="coast").run("Who built the lighthouse?")
    async for _ in handler.stream_events():
        pass
    assert "Ada Lindqvist" in str(await handler)
    assert [len(stream.report.chunks) for stream in calls.streams] == [0, 2]


@pytest.mark.behaviour("LlamaIndex", "workflows of one's own, with steps at the same time")
async def test_a_workflow(llm: CacheClipLLM, engine: Engine, nodes_of: Any, recorder: Any) -> None:
    class Ask(Event):
        text: str

    class Told(Event):
        text: str

    class Summaries(Workflow):
        @step
        async def split(self, ctx: Context, ev: StartEvent) -> Ask | None:
            for node in nodes_of():
                ctx.send_event(Ask(text=node.text))
            return None

        @step(num_workers=4)
        async def ask(self, ev: Ask) -> Told:
            answer = await llm.acomplete(f"{ev.text}\nIn a word?", max_new_tokens=3)
            return Told(text=answer.text)

        @step
        async def gather(self, ctx: Context, ev: Told) -> StopEvent | None:
            told = ctx.collect_events(ev, [Told] * len(nodes_of()))
            return None if told is None else StopEvent(result=sorted(t.text for t in told))

    calls = recorder(engine)
    expected = sorted(llm.complete(f"{n.text}\nIn a word?", max_new_tokens=3).text for n in nodes_of())
    assert await Summaries(timeout=60).run() == expected
    assert all(len(stream.report.chunks) == 1 and not stream.report.fallbacks for stream in calls.streams)


@pytest.mark.behaviour("LlamaIndex", "20 at once, tasks and threads: each call has its own chunks")
def test_twenty_threads(
    llm: CacheClipLLM, engine: Engine, embedding: Any, nodes_of: Any, recorder: Any, keys_of: Any
) -> None:
    nodes = nodes_of(40)
    CacheClipTransform(engine)(nodes)
    calls = recorder(engine)
    short = CacheClipLLM.from_engine(engine, max_new_tokens=3)
    query_engine = VectorStoreIndex(nodes, embed_model=embedding).as_query_engine(llm=short, similarity_top_k=2)
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda i: query_engine.query(f"Where is parcel P{i * 31 + 11}? [{i}]"), range(20)))
    for i, response in enumerate(responses):
        assert calls.keys(containing=f"[{i}]") == keys_of(engine, response)


@pytest.mark.behaviour("LlamaIndex", "async inside sync: `use_async=True` from plain code")
@pytest.mark.parametrize("mode", ["tree_summarize", "accumulate"])
def test_use_async_from_plain_code(
    mode: str, llm: CacheClipLLM, engine: Engine, passages_index: VectorStoreIndex, recorder: Any
) -> None:
    """LlamaIndex runs these in a fresh event loop every time."""
    query_engine = passages_index.as_query_engine(llm=llm, response_mode=mode, use_async=True, similarity_top_k=2)
    calls = recorder(engine)
    assert {str(query_engine.query("Who built it?")) for _ in range(2)}
    assert len(calls.keys()) == 4
    asyncio.run(query_engine.aquery("Who built it?"))
