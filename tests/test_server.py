"""OpenAI's endpoints over the embedded engine, asked by the clients that people have."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from http_server import serving
from openai import OpenAI
from recording import script
from threads import join, start, until
from tiny import PASSAGES, QUESTION, TEMPLATE, two_layers

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.server.app import app
from cacheclip_rag.server.client import ChunkClient
from cacheclip_rag.server.embedded import Engines

BACKBONE = two_layers()
KEYS = {"red": "acme", "blue": "zenith"}
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "\n\n".join([*PASSAGES[:3], QUESTION])},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Örebro", "days": 2}}\n</tool_call>'
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place", "days"],
        },
    },
}


class Served:
    """A server of two tenants, their engines, and a client of the first."""

    def __init__(self, backbone: Backbone) -> None:
        self.engines = Engines(lambda tenant: Engine(backbone, tenant=tenant))
        self.url = ""

    @property
    def engine(self) -> Engine:
        return self.engines.of("acme")

    def openai(self, key: str = "red") -> OpenAI:
        return OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def chat(self, messages: Any = MESSAGES, **options: Any) -> Any:
        return self.openai().chat.completions.create(
            model="tiny", messages=messages, **{"max_completion_tokens": 8, **options}
        )


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served(BACKBONE)
    with serving(app(made.engines, "tiny", KEYS)) as made.url:
        with ChunkClient(made.url, "red") as client:
            client.add(PASSAGES, document="passages")
        yield made
    BACKBONE.__dict__.pop("generate", None)


def prompt(served: Served, messages: Any = MESSAGES) -> str:
    return served.engine.backbone.chat(messages)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_engine_does(served: Served) -> None:
    answer = served.engine.generate(prompt(served), max_new_tokens=8)
    whole = served.chat()
    assert whole.object == "chat.completion" and whole.model == "tiny" and whole.id.startswith("chatcmpl-")
    [choice] = whole.choices
    assert (choice.message.role, choice.message.content) == ("assistant", answer.text)
    assert choice.finish_reason == answer.report.finish_reason == "length"
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (answer.report.prompt_tokens, 8)
    assert usage.total_tokens == usage.prompt_tokens + 8
    assert answer.report.reused > 100 and usage.prompt_tokens_details.cached_tokens >= answer.report.reused
    assert not whole.model_extra  # no report unless it is asked for


def test_a_stream_says_the_same_in_pieces(served: Served) -> None:
    *pieces, last = served.chat(stream=True)
    assert (
        "".join(piece.choices[0].delta.content for piece in [*pieces, last]) == served.chat().choices[0].message.content
    )
    assert len(pieces) > 2 and all(piece.object == "chat.completion.chunk" for piece in pieces)
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * len(pieces)
    assert last.choices[0].finish_reason == "length" and {piece.id for piece in pieces} == {last.id}
    assert all(piece.usage is None for piece in [*pieces, last])


def test_a_stream_ends_with_the_usage_where_it_is_asked_for(served: Served) -> None:
    *pieces, last = served.chat(stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage.completion_tokens == 8
    assert last.usage.prompt_tokens_details.cached_tokens > 0
    assert all(piece.choices for piece in pieces)


def test_a_text_is_completed(served: Served) -> None:
    client, text = served.openai(), "\n\n".join([*PASSAGES[:2], QUESTION])
    answer = served.engine.generate(text, max_new_tokens=16)
    for given in (text, [text]):
        whole = client.completions.create(model="tiny", prompt=given)
        assert whole.object == "text_completion" and whole.choices[0].text == answer.text
        assert whole.usage.completion_tokens == 16  # as OpenAI has it where no number is given
    pieces = list(client.completions.create(model="tiny", prompt=text, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == answer.text
    assert pieces[-1].choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_an_answer(served: Served, stream: bool) -> None:
    script(served.engine, "One. Two. Three.", "One. Two. Three.")
    for stop in (" Two", [" Three", " Two"]):
        answer = served.chat(stop=stop, stream=stream, max_completion_tokens=64)
        last = list(answer)[-1] if stream else answer
        assert last.choices[0].finish_reason == "stop"
        if not stream:
            assert answer.choices[0].message.content == "One."


def test_sampling_is_as_the_client_says(served: Served) -> None:
    greedy = served.chat().choices[0].message.content
    options = {"temperature": 2.0, "top_p": 0.95, "max_completion_tokens": 24}
    one, same, other = (served.chat(seed=seed, **options).choices[0].message.content for seed in (1, 1, 2))
    assert one == same != other and not one.startswith(greedy)
    assert (
        served.chat(temperature=0, top_p=1, n=1, presence_penalty=0, logprobs=False).choices[0].message.content
        == greedy
    )


def test_the_length_is_given_by_either_name(served: Served) -> None:
    assert served.chat(max_completion_tokens=3).usage.completion_tokens == 3
    assert served.chat(max_completion_tokens=None, max_tokens=3).usage.completion_tokens == 3


def test_messages_are_what_openai_s_are(served: Served) -> None:
    content = MESSAGES[1]["content"]
    parts = [{"type": "text", "text": content[:50]}, {"type": "text", "text": content[50:]}]
    developer = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert served.chat(developer).choices[0].message.content == served.chat().choices[0].message.content


# ---- reuse ----------------------------------------------------------------------------------------------------------


def report_of(answer: Any) -> dict[str, Any]:
    return dict(answer.model_extra["kv_transfer_params"]["cacheclip"])


def test_the_report_comes_back_where_it_is_asked_for(served: Served) -> None:
    for asked in ({"kv_transfer_params": {"cacheclip": {"report": True}}}, {"cacheclip": {"report": True}}):
        report = report_of(served.chat(extra_body=asked))
        assert report["reused"] > 100 and report["fallbacks"] == [] and report["method"] == "auto"
        assert report.keys() == served.engine.last_report.as_dict().keys()  # type: ignore[union-attr]
    *pieces, last = served.chat(extra_body={"cacheclip": {"report": True}}, stream=True)
    assert report_of(last)["completion_tokens"] == 8 and not any(piece.model_extra for piece in pieces)


def test_a_request_says_how_its_chunks_are_reused(served: Served) -> None:
    def asked(**own: Any) -> dict[str, Any]:
        return report_of(served.chat(extra_body={"cacheclip": {"report": True, **own}}))

    assert asked(method="naive")["recomputed"] == 0
    assert asked(method="query_guided:group_size=1", recompute_ratio=0.5)["requested_ratio"] == 0.5
    plain = asked(reuse=False, method="naive")
    assert (plain["method"], plain["reused"], plain["cached_tokens"]) == ("full", 0, 0)


@pytest.mark.parametrize(
    "method",
    [
        "nave",
        "auto:nothing=1",
        "cachecraft",
        "cacheclip",
        'naive:prefix="of a client\'s own"',
        "prefix-cache:block=7",
    ],
)
def test_a_method_that_is_unknown_or_not_for_clients_is_400(served: Served, method: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Known|no parameter|keeps the KV|auxiliary|KV of its own"):
        served.chat(extra_body={"cacheclip": {"method": method}})
    assert len(list(served.engine.collections)) == 1


def test_a_tenant_s_chunks_serve_its_own_requests_only(served: Served) -> None:
    def asked(key: str) -> Any:
        forged = {"report": True, "tenant": "acme"}
        return served.openai(key).chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"cacheclip": forged}
        )

    assert report_of(asked("red"))["reused"] > 0
    assert report_of(asked("blue"))["reused"] == 0 == asked("blue").usage.prompt_tokens_details.cached_tokens
    with pytest.raises(openai.AuthenticationError):
        asked("green")


def test_what_is_deleted_is_not_reused(served: Served) -> None:
    with ChunkClient(served.url, "red") as client:
        client.forget(PASSAGES[:1])
        one = report_of(served.chat(extra_body={"cacheclip": {"report": True}}))
        client.forget_document("passages")
        none = report_of(served.chat(extra_body={"cacheclip": {"report": True}}))
    assert len(one["chunks"]) == 2 and none["chunks"] == [] and none["reused"] == 0


# ---- tools and structured output ------------------------------------------------------------------------------------


def test_tool_calls_whole_and_streamed(served: Served) -> None:
    script(served.engine, *[f"One moment.\n{CALL}"] * 2)
    options: dict[str, Any] = {"tools": [TOOL], "max_completion_tokens": 200}
    choice = served.chat(**options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    [call] = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"place": "Örebro", "days": 2}
    pieces = list(served.chat(**options, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == "One moment."
    [streamed] = pieces[-1].choices[0].delta.tool_calls
    assert streamed.index == 0 and streamed.function.name == "weather"
    assert pieces[-1].choices[0].finish_reason == "tool_calls"


def test_the_answer_of_a_tool_is_read(served: Served) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Örebro"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
    ]
    assert served.chat(messages, tools=[TOOL]).usage.prompt_tokens > served.chat(tools=[TOOL]).usage.prompt_tokens


def test_a_forced_call_and_a_schema_are_followed(served: Served) -> None:
    options: dict[str, Any] = {"max_completion_tokens": 300}
    [call] = served.chat(tools=[TOOL], tool_choice="required", **options).choices[0].message.tool_calls
    assert json.loads(call.function.arguments).keys() == {"place", "days"}
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = json.loads(served.chat(response_format=wanted, **options).choices[0].message.content)
    assert isinstance(answer["age"], int)


def test_a_model_without_tools_says_so() -> None:
    plain = Served(two_layers(TEMPLATE))
    with (
        serving(app(plain.engines, "tiny", KEYS)) as plain.url,
        pytest.raises(openai.BadRequestError, match="no tool calls"),
    ):
        plain.chat(tools=[TOOL])


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n": 2}, "n=2"),
        ({"logprobs": True}, "logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": [1]}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text only"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "context length"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"extra_body": {"cacheclip": {"recompute_ratio": 2}}}, "recompute_ratio"),
    ],
)
def test_bad_input_is_400_before_anything_is_streamed(
    served: Served, options: dict[str, Any], said: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        served.chat(**options, stream=stream)
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]
    assert served.chat(max_completion_tokens=1).usage.completion_tokens == 1


def test_other_models_and_paths_are_404(served: Served) -> None:
    client = served.openai()
    assert [model.id for model in client.models.list()] == [client.models.retrieve("tiny").id] == ["tiny"]
    assert client.models.retrieve("tiny").model_extra == {"max_model_len": BACKBONE.context_length}
    for ask in (
        lambda: client.models.retrieve("gpt"),
        lambda: client.chat.completions.create(model="gpt", messages=MESSAGES),
        lambda: client.completions.create(model="gpt", prompt="Hello"),
        lambda: client.embeddings.create(model="tiny", input="Hello"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_inside_is_an_error_and_the_next_request_is_served(served: Served, stream: bool) -> None:
    def broken(*_: Any, **__: Any) -> Iterator[int]:
        yield from served.engine.backbone.tokenise("One", plain=True).ids.tolist()
        raise RuntimeError("secret detail")

    served.engine.backbone.generate = broken  # type: ignore[method-assign]
    with pytest.raises(openai.APIError, match="internal error") as caught:
        list(served.chat(stream=stream))
    assert "secret" not in str(caught.value.body)
    served.engine.backbone.__dict__.pop("generate")
    assert served.chat(max_completion_tokens=1).usage.completion_tokens == 1


# ---- many at once ---------------------------------------------------------------------------------------------------


def test_health_is_answered_while_the_model_is_busy(served: Served) -> None:
    with served.engine.lock:
        waiting = [start(lambda: served.chat(max_completion_tokens=1)) for _ in range(12)]
        until(lambda: served.engine.lock.waiting > 0)
        assert httpx.get(served.url.removesuffix("v1") + "health").json() == {"status": "ok"}
        with pytest.raises(openai.NotFoundError):
            served.openai().models.retrieve("gpt")
    join(*waiting)


async def test_many_at_once_get_the_answers_of_one_after_another(served: Served) -> None:
    clients = [openai.AsyncOpenAI(base_url=served.url, api_key=key, max_retries=0) for key in KEYS]

    async def ask(number: int, stream: bool) -> str:
        chosen = [PASSAGES[number % 5], PASSAGES[(number * 2 + 1) % 5], f"{QUESTION} {number}"]
        messages: Any = [{"role": "user", "content": "\n\n".join(chosen)}]
        answer = await clients[number % 3 % 2].chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, stream=stream
        )
        if not stream:
            return str(answer.choices[0].message.content)
        return "".join([piece.choices[0].delta.content or "" async for piece in answer])

    alone = [await ask(number, False) for number in range(12)]
    together = await asyncio.gather(*(ask(number, bool(number % 2)) for number in range(12)))
    assert together == alone and len(set(alone)) > 3
    assert served.engines.of("zenith").stats().requests == 8


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(served: Served, stream: bool) -> None:
    token = served.engine.backbone.tokenise("a", plain=True).ids.tolist()

    def endless(*_: Any, **__: Any) -> Iterator[int]:
        while True:
            yield from token
            time.sleep(0.01)

    served.engine.backbone.generate = endless  # type: ignore[method-assign]
    if stream:
        next(iter(answer := served.chat(stream=True)))
        answer.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            served.chat(timeout=httpx.Timeout(20, read=0.5))
    until(lambda: served.engine.stats().finished.get("auto") == {"cancelled": 1})
    assert served.engine.stats().in_flight == 0


def test_a_client_that_leaves_while_it_waits_ends_its_request(served: Served) -> None:
    with served.engine.lock, pytest.raises(openai.APITimeoutError):
        served.chat(timeout=httpx.Timeout(20, read=0.5))
    until(lambda: served.engine.stats().finished.get("auto") == {"cancelled": 1})
    assert served.engine.stats().in_flight == 0


# ---- frameworks' own clients ----------------------------------------------------------------------------------------


def test_langchain_s_client(served: Served) -> None:
    from langchain_openai import ChatOpenAI

    options: Any = {"base_url": served.url, "api_key": "red", "max_tokens": 8, "max_retries": 0}
    llm = ChatOpenAI(model="tiny", stream_usage=True, **options)
    text = MESSAGES[1]["content"]
    message = llm.invoke(text)
    assert message.content == served.chat(MESSAGES[1:]).choices[0].message.content
    assert message.usage_metadata["input_token_details"]["cache_read"] > 100
    pieces = list(llm.stream(text))
    assert "".join(piece.content for piece in pieces) == message.content
    assert sum((piece.usage_metadata or {}).get("output_tokens", 0) for piece in pieces) == 8
    script(served.engine, CALL)
    [call] = llm.bind_tools([TOOL]).invoke(text, max_tokens=200).tool_calls
    assert call["name"] == "weather" and call["args"] == {"place": "Örebro", "days": 2}


def test_llamaindex_s_client(served: Served) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model="tiny", api_base=served.url, api_key="red", is_chat_model=True, max_tokens=8, temperature=0, max_retries=0
    )
    text = MESSAGES[1]["content"]
    wanted = served.chat(MESSAGES[1:]).choices[0].message.content
    assert llm.complete(text).text == llm.chat([ChatMessage(text)]).message.content == wanted
    assert "".join(piece.delta or "" for piece in llm.stream_chat([ChatMessage(text)])) == wanted
    text_llm = OpenAILike(model="tiny", api_base=served.url, api_key="red", max_tokens=8, temperature=0)
    assert text_llm.complete(text).text == served.engine.generate(text, max_new_tokens=8).text


def test_a_real_model_answers_from_documents(smollm2: Backbone) -> None:
    served = Served(smollm2)
    with serving(app(served.engines, "tiny", KEYS)) as served.url, ChunkClient(served.url, "red") as client:
        assert client.add(PASSAGES, document="passages").encoded == 5
        answer = served.chat(max_completion_tokens=12, extra_body={"cacheclip": {"report": True}})
        report = report_of(answer)
        assert report["fallbacks"] == [] and report["reused"] > report["recomputed"] > 0
        assert answer.choices[0].message.content == served.engine.generate(prompt(served), max_new_tokens=12).text
        plain = served.chat(max_completion_tokens=12, extra_body={"cacheclip": {"recompute_ratio": 1.0}})
        full = served.engine.generate(prompt(served), method="full", max_new_tokens=12)
        assert plain.choices[0].message.content == full.text
