"""Tools and structured output: offered and read as the model's template writes them, and forced where asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
from llama_index.core import PromptTemplate
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.program.function_program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.cacheclip import CacheClipLLM
from tiny import PASSAGES, TEMPLATE, two_layers

from cacheclip_rag import ConfigurationError, Engine

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro", "days": 2}}\n</tool_call>'
STREAMS = ["chat", "achat", "stream", "astream"]


def weather(place: str, days: int = 1) -> str:
    """The weather at a place."""
    return f"{place}: rain for {days} days"


def clock() -> str:
    """The time."""
    return "noon"


WEATHER, CLOCK = FunctionTool.from_defaults(weather), FunctionTool.from_defaults(clock)


class Person(BaseModel):
    """Someone."""

    name: str
    age: int
    trade: Literal["smith", "tailor"] | None = None
    friends: list[str] = Field(default_factory=list)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """Its chat template offers tools."""
    with Engine(two_layers(), method="query_guided") as engine:
        yield engine


@pytest.fixture
def plain_engine() -> Iterator[Engine]:
    """Its chat template knows no tools."""
    with Engine(two_layers(TEMPLATE), method="query_guided") as engine:
        yield engine


async def answers(llm: CacheClipLLM, how: str, **asked: Any) -> list[ChatResponse]:
    if how == "chat":
        return [llm.chat_with_tools(**asked)]
    if how == "achat":
        return [await llm.achat_with_tools(**asked)]
    if how == "stream":
        return list(llm.stream_chat_with_tools(**asked))
    return [response async for response in await llm.astream_chat_with_tools(**asked)]


def test_the_template_says_whether_it_calls_functions(engine: Engine, plain_engine: Engine) -> None:
    assert issubclass(CacheClipLLM, FunctionCallingLLM)
    assert CacheClipLLM.from_engine(engine).metadata.is_function_calling_model
    assert not CacheClipLLM.from_engine(plain_engine).metadata.is_function_calling_model
    own = CacheClipLLM.from_engine(engine, messages_to_prompt=lambda messages: "M:" + str(messages[0].content))
    assert not own.metadata.is_function_calling_model
    with pytest.raises(NotImplementedError, match="messages_to_prompt"):
        own.chat_with_tools([WEATHER], "Weather?")


@pytest.mark.behaviour("LlamaIndex", "tool calls, forced ones too")
@pytest.mark.parametrize("how", STREAMS)
async def test_calls_reach_the_message(engine: Engine, scripted: Callable[..., None], how: str) -> None:
    scripted(f"One moment.\n{CALL}")
    llm = CacheClipLLM.from_engine(engine)
    *before, last = await answers(llm, how, tools=[WEATHER, CLOCK], user_msg="Weather?")
    assert last.message.content == "One moment."
    if before:
        assert "".join(response.delta or "" for response in before) == "One moment."  # text does not wait for the call
        assert not llm.get_tool_calls_from_response(before[0], error_on_no_tool_call=False)
    (call,) = llm.get_tool_calls_from_response(last)
    assert call.tool_name == "weather" and call.tool_kwargs == {"place": "Örebro", "days": 2}
    assert call.tool_id.isalnum() and len(call.tool_id) == 9
    (written,) = last.message.additional_kwargs["tool_calls"]
    assert written["id"] == call.tool_id and json.loads(written["function"]["arguments"]) == call.tool_kwargs
    assert last.raw["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(("parallel", "number"), [(True, 2), (False, 1)])
def test_one_call_at_a_time(engine: Engine, scripted: Callable[..., None], parallel: bool, number: int) -> None:
    scripted(f"{CALL}\n{CALL}")
    llm = CacheClipLLM.from_engine(engine)
    answer = llm.chat_with_tools([WEATHER], "Weather?", allow_parallel_tool_calls=parallel)
    assert len(llm.get_tool_calls_from_response(answer)) == number


@pytest.mark.parametrize("how", ["chat", "stream"])
async def test_a_broken_call_is_text(engine: Engine, scripted: Callable[..., None], how: str) -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"pl'
    scripted(broken)
    llm = CacheClipLLM.from_engine(engine)
    responses = await answers(llm, how, tools=[WEATHER], user_msg="Weather?")
    assert responses[-1].message.content == broken
    assert llm.get_tool_calls_from_response(responses[-1], error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(responses[-1])


def test_tools_are_offered_by_the_template(engine: Engine, recorder: Any) -> None:
    llm, calls = CacheClipLLM.from_engine(engine, max_new_tokens=4), recorder(engine)
    llm.chat_with_tools([WEATHER], "Weather?")
    assert "<tools>" in calls.prompts[0] and "The weather at a place." in calls.prompts[0]
    llm.chat_with_tools([WEATHER], "Weather?", tool_choice="none")
    llm.chat_with_tools([], "Weather?")
    assert "<tools>" not in "".join(calls.prompts[1:])
    with pytest.raises(ConfigurationError, match="weather"):
        llm.chat_with_tools([WEATHER], "Weather?", tool_choice="clock")


@pytest.mark.behaviour("LlamaIndex", "tool calls, forced ones too")
@pytest.mark.parametrize("how", STREAMS)
@pytest.mark.parametrize("choice", ["any", "weather", {"type": "function", "function": {"name": "clock"}}])
async def test_a_choice_forces_a_call(engine: Engine, how: str, choice: Any) -> None:
    """A random model calls nothing of its own accord."""
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=120)
    asked: dict[str, Any] = {"tools": [WEATHER, CLOCK], "user_msg": "Hello!"}
    forced = {"tool_required": True} if choice == "any" else {"tool_choice": choice}
    *_, free = await answers(llm, how, **asked)
    assert not llm.get_tool_calls_from_response(free, error_on_no_tool_call=False)
    *_, last = await answers(llm, how, **asked, **forced)
    (call,) = llm.get_tool_calls_from_response(last)
    if choice == "weather":
        assert call.tool_name == "weather" and isinstance(call.tool_kwargs["place"], str)
    elif isinstance(choice, dict):
        assert call.tool_name == "clock" and call.tool_kwargs == {}
    assert not last.message.content


def test_a_model_whose_template_has_no_tools_says_so(plain_engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(plain_engine, max_new_tokens=4)
    with pytest.raises(NotImplementedError, match="template"):
        llm.chat_with_tools([WEATHER], "Weather?")


def test_tool_histories(engine: Engine, recorder: Any) -> None:
    llm, calls = CacheClipLLM.from_engine(engine, max_new_tokens=4), recorder(engine)
    block = ToolCallBlock(tool_call_id="1", tool_name="weather", tool_kwargs={"place": "Örebro"})
    function = {"name": "weather", "arguments": '{"place": "Örebro"}'}
    older = {"tool_calls": [{"id": "1", "type": "function", "function": function}]}
    for answer in (
        ChatMessage(role="assistant", blocks=[TextBlock(text=""), block]),
        ChatMessage("", role="assistant", additional_kwargs=older),
    ):
        result = ChatMessage("rain", role=MessageRole.TOOL, additional_kwargs={"tool_call_id": "1"})
        llm.chat_with_tools([WEATHER], chat_history=[ChatMessage("Weather?"), answer, result])
    assert calls.prompts[0] == calls.prompts[1]
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro"}}\n</tool_call>' in calls.prompts[0]
    assert "<tool_response>\nrain\n</tool_response>" in calls.prompts[0]


@pytest.mark.behaviour("LlamaIndex", "agents that call functions; streaming or not, alone or in a workflow")
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workflow", [True, False])
async def test_a_function_agent(
    engine: Engine, scripted: Callable[..., None], recorder: Any, streaming: bool, workflow: bool
) -> None:
    engine.ensure(PASSAGES)

    def look_up(topic: str) -> str:
        """What is known of a topic."""
        return "\n\n".join(PASSAGES[:2])

    calls = recorder(engine)
    scripted('<tool_call>\n{"name": "look_up", "arguments": {"topic": "railway"}}\n</tool_call>', "It closed in 1957.")
    llm = CacheClipLLM.from_engine(engine)
    agent: Any = FunctionAgent(llm=llm, tools=[look_up], streaming=streaming, name="agent", description="It answers.")
    agent = AgentWorkflow(agents=[agent]) if workflow else agent
    assert str(await agent.run("When did the railway close?")) == "It closed in 1957."
    assert len(calls) == 2 and len(calls.keys()) == 2  # chunks in the tool's answer


def test_agents_of_the_right_kind(engine: Engine, plain_engine: Engine) -> None:
    for given, kind in ((engine, FunctionAgent), (plain_engine, ReActAgent)):
        workflow = AgentWorkflow.from_tools_or_functions([weather], llm=CacheClipLLM.from_engine(given))
        assert isinstance(next(iter(workflow.agents.values())), kind)


def test_predict_and_call(engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=150)
    answer = llm.predict_and_call([CLOCK, WEATHER], "Time?", tool_choice="clock")
    assert answer.response == "noon"


# ---- structured output ----------------------------------------------------------------------------------------------

PROMPT = PromptTemplate("Who is {who}?")
STRUCTURED = "structured output: `output_cls`, structured LLM, `structured_predict`"


@pytest.mark.behaviour("LlamaIndex", STRUCTURED)
@pytest.mark.parametrize("mode", [PydanticProgramMode.LLM, PydanticProgramMode.FUNCTION, PydanticProgramMode.DEFAULT])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
async def test_structured_output_has_the_shape(engine: Engine, mode: Any, temperature: float) -> None:
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=150, temperature=temperature, pydantic_program_mode=mode)
    assert isinstance(llm.structured_predict(Person, PROMPT, who="it"), Person)
    assert isinstance(await llm.astructured_predict(Person, PROMPT, who="it"), Person)
    pieces = list(llm.stream_structured_predict(Person, PROMPT, who="it"))
    apieces = [piece async for piece in await llm.astream_structured_predict(Person, PROMPT, who="it")]
    for last in (pieces[-1], apieces[-1]):
        assert isinstance(Person.model_validate(last.model_dump()), Person)
    structured = llm.as_structured_llm(Person)
    assert isinstance(structured.chat([ChatMessage("Who?")]).raw, Person)
    assert isinstance((await structured.acomplete("Who?")).raw, Person)


@pytest.mark.behaviour("LlamaIndex", STRUCTURED)
async def test_structured_output_without_tools_has_the_shape(plain_engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(plain_engine, max_new_tokens=150)
    assert isinstance(llm.structured_predict(Person, PROMPT, who="it"), Person)
    assert isinstance(llm.as_structured_llm(Person).complete("Who?").raw, Person)
    pieces = list(llm.stream_structured_predict(Person, PROMPT, who="it"))
    assert len(pieces) > 2 and Person.model_validate(pieces[-1].model_dump())


def test_a_model_without_chat_template_writes_json_too() -> None:
    with Engine(two_layers(None), method="query_guided") as engine:
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=150)
        assert isinstance(llm.structured_predict(Person, PROMPT, who="it"), Person)


def test_the_schema_is_told_once(engine: Engine, recorder: Any) -> None:
    llm, calls = CacheClipLLM.from_engine(engine, max_new_tokens=150), recorder(engine)
    llm.structured_predict(Person, PROMPT, who="it")
    llm.complete("Who?", response_format=_format(Person))
    llm.chat([ChatMessage("Be brief.", role="system"), ChatMessage("Who?")], response_format=_format(Person))
    assert [prompt.count('"trade"') for prompt in calls.prompts] == [1, 1, 1]
    assert calls.prompts[2].startswith("<|im_start|>system\nBe brief.\n\nAnswer with JSON")


def test_a_format_for_one_call(engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=150)
    own = CacheClipLLM.from_engine(
        engine, max_new_tokens=150, messages_to_prompt=lambda messages: "\n".join(str(m.content) for m in messages)
    )
    for text in (
        llm.complete("Who?", response_format=_format(Person)).text,
        llm.chat([ChatMessage("Who?")], response_format=_format(Person)).message.content,
        own.chat([ChatMessage("Who?")], response_format=_format(Person)).message.content,
    ):
        assert isinstance(Person.model_validate_json(text or ""), Person)
    assert isinstance(json.loads(llm.complete("Who?", response_format={"type": "json_object"}).text), dict)
    with pytest.raises(ConfigurationError, match="response_format"):
        llm.complete("Who?", response_format="json")


def test_a_function_calling_program_gets_its_call(engine: Engine) -> None:
    llm = CacheClipLLM.from_engine(engine, max_new_tokens=150)
    program = FunctionCallingProgram.from_defaults(Person, prompt_template_str="Who is {who}?", llm=llm)
    assert isinstance(program(who="it"), Person)


def _format(model: type[BaseModel]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": model.model_json_schema()}}
