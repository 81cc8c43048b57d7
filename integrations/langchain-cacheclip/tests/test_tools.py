"""Tools and structured output: offered and read as the model's template writes them, and forced where asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypedDict

import pytest
from langchain_cacheclip import ChatCacheClip
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from cacheclip_rag import ConfigurationError, Engine

CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro", "days": 2}}\n</tool_call>'


@tool
def weather(place: str, days: int = 1) -> str:
    """The weather at a place."""
    return f"{place}: rain for {days} days"


@tool
def clock() -> str:
    """The time."""
    return "noon"


class Person(BaseModel):
    """Someone."""

    name: str
    age: int
    trade: Literal["smith", "tailor"] | None = None
    friends: list[str] = Field(default_factory=list)


class PersonDict(TypedDict):
    """Someone."""

    name: Annotated[str, ..., "how they are called"]
    age: int


@pytest.mark.behaviour("LangChain", "tool calls, forced ones too")
async def test_calls_reach_the_message(engine: Engine, scripted: Callable[..., None]) -> None:
    scripted(*[f"One moment.\n{CALL}"] * 4)
    llm = ChatCacheClip.from_engine(engine).bind_tools([weather, clock])
    whole, ahead = llm.invoke("Weather?"), await llm.ainvoke("Weather?")
    chunks = list(llm.stream("Weather?"))
    async_chunks = [chunk async for chunk in llm.astream("Weather?")]
    assert "".join(chunk.text for chunk in chunks[:-1]) == "One moment."  # text goes on before the call is complete
    streamed, astreamed = (first.__add__(rest) for first, *rest in (chunks, async_chunks))
    for message in (whole, ahead, streamed, astreamed):
        assert message.text == "One moment."
        (call,) = message.tool_calls
        assert call["name"] == "weather" and call["args"] == {"place": "Örebro", "days": 2}
        assert call["id"] and call["id"].isalnum() and len(call["id"]) == 9
        assert message.response_metadata["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("parallel", "number"), [(None, 2), (True, 2), (False, 1)])
def test_one_call_at_a_time(engine: Engine, scripted: Callable[..., None], parallel: bool | None, number: int) -> None:
    scripted(*[f"{CALL}\n{CALL}"] * 2)
    llm = ChatCacheClip.from_engine(engine).bind_tools([weather], parallel_tool_calls=parallel)
    first, *rest = llm.stream("Weather?")
    for message in (llm.invoke("Weather?"), first.__add__(rest)):
        assert len(message.tool_calls) == number


def test_a_broken_call_is_an_invalid_one(engine: Engine, scripted: Callable[..., None]) -> None:
    scripted(*['<tool_call>\n{"name": "weather", "arguments": {"pl'] * 2)
    llm = ChatCacheClip.from_engine(engine).bind_tools([weather])
    first, *rest = llm.stream("Weather?")
    for message in (llm.invoke("Weather?"), first.__add__(rest)):
        assert not message.tool_calls and len(message.invalid_tool_calls) == 1


def test_tools_are_offered_by_the_template(engine: Engine, llm: ChatCacheClip, recorder: Any) -> None:
    calls = recorder(engine)
    llm.bind_tools([weather]).invoke("Weather?")
    assert "<tools>" in calls.prompts[0] and '"description": "The weather at a place."' in calls.prompts[0]
    llm.bind_tools([weather], tool_choice="none").invoke("Weather?")
    llm.bind_tools([]).invoke("Weather?")
    assert "<tools>" not in "".join(calls.prompts[1:])


@pytest.mark.behaviour("LangChain", "tool calls, forced ones too")
@pytest.mark.parametrize(
    "choice", ["any", "required", True, "weather", {"type": "function", "function": {"name": "clock"}}]
)
def test_a_choice_forces_a_call(engine: Engine, choice: Any) -> None:
    """A random model calls nothing of its own accord."""
    llm = ChatCacheClip.from_engine(engine, max_tokens=120)
    assert not llm.bind_tools([weather, clock]).invoke("Hello!").tool_calls
    bound = llm.bind_tools([weather, clock], tool_choice=choice)
    first, *rest = bound.stream("Hello!")
    for message in (bound.invoke("Hello!"), first.__add__(rest)):
        (call,) = message.tool_calls
        if choice == "weather":
            assert call["name"] == "weather" and isinstance(call["args"]["place"], str)
        elif isinstance(choice, dict):
            assert call["name"] == "clock" and call["args"] == {}
        assert message.text == ""


def test_choices_that_are_none(llm: ChatCacheClip) -> None:
    with pytest.raises(ConfigurationError, match="clock"):
        llm.bind_tools([clock], tool_choice="weather")


def test_a_model_whose_template_has_no_tools_says_so(plain_engine: Engine) -> None:
    llm = ChatCacheClip.from_engine(plain_engine, max_tokens=60)
    with pytest.raises(NotImplementedError, match="template"):
        llm.bind_tools([weather])
    with pytest.raises(NotImplementedError, match="template"):
        llm.invoke("Weather?", tools=[weather])
    with pytest.raises(NotImplementedError, match="template"):
        llm.with_structured_output(Person, method="function_calling")
    assert llm.with_structured_output(PersonDict).invoke("Who?").keys() == {"name", "age"}


def test_tool_histories(engine: Engine, llm: ChatCacheClip, recorder: Any) -> None:
    calls = recorder(engine)
    history = [
        HumanMessage("Weather?"),
        AIMessage("", tool_calls=[{"name": "weather", "args": {"place": "Örebro"}, "id": "1", "type": "tool_call"}]),
        ToolMessage("rain", tool_call_id="1", name="weather"),
    ]
    llm.bind_tools([weather]).invoke(history)
    assert '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro"}}\n</tool_call>' in calls.prompts[0]
    assert "<tool_response>\nrain\n</tool_response>" in calls.prompts[0]


@pytest.mark.behaviour("LangChain", "structured output: agents and `with_structured_output`")
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("temperature", [0, 2.0])
def test_structured_output_has_the_shape(engine: Engine, method: Any, temperature: float) -> None:
    llm = ChatCacheClip.from_engine(engine, max_tokens=150, temperature=temperature)
    assert isinstance(llm.with_structured_output(Person, method=method).invoke("Who?"), Person)
    assert isinstance(llm.with_structured_output(PersonDict, method=method).invoke("Who?")["age"], int)
    both = llm.with_structured_output(Person, method=method, include_raw=True).invoke("Who?")
    assert isinstance(both["parsed"], Person) and both["raw"].usage_metadata and both["parsing_error"] is None
    assert isinstance(list(llm.with_structured_output(Person, method=method).stream("Who?"))[-1], Person)


def test_structured_output_tells_the_model_the_schema(engine: Engine, llm: ChatCacheClip, recorder: Any) -> None:
    calls = recorder(engine)
    model = ChatCacheClip.from_engine(engine, max_tokens=90)
    model.with_structured_output(Person).invoke([("system", "Be brief."), ("human", "Who?")])
    assert calls.prompts[0].startswith("<|im_start|>system\nBe brief.\n\nAnswer with JSON")
    assert '"trade"' in calls.prompts[0]
    assert calls.prompts[0].endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")


def test_json_mode(engine: Engine) -> None:
    llm = ChatCacheClip.from_engine(engine, max_tokens=40)
    raw = llm.with_structured_output(Person, method="json_mode", include_raw=True).invoke("Who?")
    assert isinstance(json.loads(raw["raw"].text), dict)
    assert isinstance(raw["parsing_error"], OutputParserException) and raw["parsed"] is None


def test_structured_output_refuses_what_it_does_not_know(llm: ChatCacheClip) -> None:
    with pytest.raises(ValueError, match="unsupported"):
        llm.with_structured_output(Person, colour="red")
    with pytest.raises(ConfigurationError, match="json_schema"):
        llm.with_structured_output(Person, method="telepathy")  # type: ignore[arg-type]
