"""The embedded engine behind OpenAI's endpoints: chat and text completions, streamed or whole."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ..engine import Engine
from ..errors import ConfigurationError
from ..frameworks.messages import check_text_only, message
from ..frameworks.options import read_options
from ..frameworks.pump import pump
from ..frameworks.request import ChatRequest, chat_request
from .access import tenant_of
from .chunks import Route
from .embedded import Engines
from .problems import problem
from .wire import Wire, sse

T = TypeVar("T")

LONGEST = 1024
"""Tokens of an answer, unless the request says another number."""

_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "seed", "stop", "repetition_penalty")
_UNAVAILABLE: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "audio": (),
    "functions": ([],),
    "function_call": ("none",),
}
"""What would change an answer and does not exist here, with the values that change nothing."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {"top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0)}
"""What clients send to say that nothing is to be left out."""

_CLIENT_GONE = 499


class StreamOptions(BaseModel):
    include_usage: bool = False


class Asked(BaseModel):
    """What chat and text completions have in common. Fields that are not listed here are checked in `options_of`."""

    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    kv_transfer_params: dict[str, Any] = {}

    @property
    def cacheclip(self) -> dict[str, Any]:
        """What the request says of reuse; `Access` has checked it."""
        found: dict[str, Any] = self.kv_transfer_params.get("cacheclip", {})
        return found


class Tool(BaseModel):
    model_config = ConfigDict(extra="allow")

    class Function(BaseModel):
        model_config = ConfigDict(extra="allow")
        name: str

    type: str = "function"
    function: Function


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    class Call(BaseModel):
        class Function(BaseModel):
            name: str
            arguments: str = "{}"

        id: str | None = None
        function: Function

    role: str
    content: str | list[dict[str, Any]] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class Chat(Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    tools: list[Tool] | None = None
    tool_choice: Any = None
    response_format: Any = None
    parallel_tool_calls: bool | None = None


class Completion(Asked):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]


def router(engines: Engines, model: str) -> APIRouter:
    """``/v1/chat/completions``, ``/v1/completions`` and ``/v1/models``, where the model is called ``model``."""
    routes = APIRouter(prefix="/v1", route_class=Route, tags=["answers"])
    about = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "cacheclip-rag"}

    async def described(request: Request) -> dict[str, Any]:
        engine = await asyncio.to_thread(engines.of, tenant_of(request.scope))
        return about | {"max_model_len": engine.backbone.context_length}  # as vLLM's server calls it

    @routes.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        return {"object": "list", "data": [await described(request)]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        return JSONResponse(await described(request)) if name == model else unknown(name)

    @routes.post("/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        def ask(engine: Engine) -> ChatRequest:
            return chat_request(
                engine,
                [_written(one) for one in body.messages],
                options_of(body, body.max_completion_tokens or body.max_tokens),
                tools=[tool.model_dump(exclude_unset=True) for tool in body.tools or ()],
                tool_choice=body.tool_choice,
                response_format=body.response_format,
                parallel_calls=body.parallel_tool_calls is not False,
            )

        return await answer(body, request, ask, Wire(model, True, _wants_report(body)))

    @routes.post("/completions")
    async def complete(body: Completion, request: Request) -> Response:
        prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]

        def ask(engine: Engine) -> ChatRequest:
            return ChatRequest(engine, prompt, options_of(body, body.max_tokens or 16))  # OpenAI's default

        return await answer(body, request, ask, Wire(model, False, _wants_report(body)))

    async def answer(body: Asked, request: Request, ask: Callable[[Engine], ChatRequest], wire: Wire) -> Response:
        if body.model != model:
            return unknown(body.model)
        cancel, tenant = threading.Event(), tenant_of(request.scope)

        def whole() -> Generator[dict[str, Any], None, None]:
            parsed, report = ask(engines.of(tenant)).answer(cancel)
            yield wire.whole(parsed, report)

        def pieces() -> Generator[dict[str, Any], None, None]:
            with ask(engines.of(tenant)).stream(cancel) as stream:
                yield from map(wire.piece, stream)
                yield wire.last(stream.rest, stream.report)
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield wire.usage(stream.report)

        events = pump(pieces() if body.stream else whole(), cancel)
        try:  # an error before the first token is an answer of its own
            first = await _while_connected(request, anext(events))
        except ConnectionError:
            return Response(status_code=_CLIENT_GONE)
        return (
            StreamingResponse(sse(first, events), media_type="text/event-stream")
            if body.stream
            else JSONResponse(first)
        )

    def unknown(name: str) -> Response:
        return JSONResponse(problem(404, f'no model is called "{name}" here: it is "{model}"', "model"), 404)

    return routes


def _wants_report(body: Asked) -> bool:
    return body.cacheclip.get("report") is True


def options_of(body: Asked, longest: int | None) -> dict[str, Any]:
    """The engine's options for this request. Raises `ConfigurationError` for what it cannot do."""
    given = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    for name, harmless in _UNAVAILABLE.items():
        if name in given and given[name] not in harmless:
            raise ConfigurationError(f"{name}={given[name]!r} is not available with this library's own engine")
    options = read_options(
        {name: given[name] for name in _OPTIONS if given.get(name) not in _NEUTRAL.get(name, (None,))}
    )
    about: dict[str, Any] = {
        name: body.cacheclip[name] for name in ("method", "recompute_ratio") if name in body.cacheclip
    }
    if body.cacheclip.get("reuse") is False:
        about = {"method": "full"}
    return {**options, **about, "max_new_tokens": longest or LONGEST}


def _written(given: Message) -> dict[str, Any]:
    """A message as chat templates take it. Raises `PromptError` for one with images or the like, `ConfigurationError`
    for a call whose arguments are no JSON object.
    """
    blocks = [{"type": "text", "text": given.content or ""}] if not isinstance(given.content, list) else given.content
    check_text_only(given.role, (str(block.get("type")) for block in blocks if block.get("type") != "text"))
    calls = [(call.id, call.function.name, _arguments(call.function.arguments)) for call in given.tool_calls or ()]
    text = "".join(str(block.get("text", "")) for block in blocks if block.get("type") == "text")
    return message(given.role, text, calls=calls, tool_call_id=given.tool_call_id, name=given.name)


def _arguments(written: str) -> dict[str, Any]:
    try:
        read = json.loads(written or "{}")
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise ConfigurationError("the arguments of a tool call in the messages are no JSON object")
    return read


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """What the work gives. Cancels it and raises ConnectionError once the client is gone."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
