"""`CacheClipLLM`: a local model that finds known chunks in its prompt and reuses their KV."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BaseModel, Field, PrivateAttr
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.core.program.utils import get_program_for_llm
from llama_index.core.types import PydanticProgramMode

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.frameworks import (
    ChatRequest,
    EngineHandle,
    EngineSettings,
    call_options,
    chat_request,
    engine_name,
    guided,
    in_thread,
    pump,
)
from cacheclip_rag.frameworks import fields as shared
from cacheclip_rag.frameworks.structured.calls import Call, Parsed
from cacheclip_rag.frameworks.structured.dialect import dialect_of
from cacheclip_rag.frameworks.structured.formats import format_of, schema_format

from .closing import closes_its_stream, noted
from .copies import restore
from .events import tell
from .prompts import ChatTemplate, UserTurn, conversation
from .tools import answer_message, offered, selections

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool

    from cacheclip_rag.engine import Engine
    from cacheclip_rag.frameworks.request import AnswerStream
    from cacheclip_rag.report import Report

R = TypeVar("R")
Respond: TypeAlias = "Callable[[str, str | None, Sequence[Call], Report], R]"
"""Makes a response of the text so far, what is new of it, the tool calls, and the report."""

_ALSO_CALLED = {"max_tokens": "max_new_tokens", "model": "model_name"}
"""LangChain's names of fields."""


class CacheClipLLM(FunctionCallingLLM):
    """A local model that reads a document chunk once and keeps its KV.

    Chunks are recognised by their text in the final prompt, so query engines, chat engines and agents work unchanged.
    Weights are loaded at the first use, once per process for all objects that ask for the same model and KV folder.

    With ``base_url`` it is a model behind a server, and the object a `CacheClipServerLLM`, which is used the same way.

    Example:
        ``llm = CacheClipLLM(model_name="qwen2.5-coder-0.5b-instruct", kv_dir=".cacheclip")``
        ``llm = CacheClipLLM(base_url="http://localhost:8000/v1", api_key="...")``

    """

    model_name: shared.ModelName
    auxiliary: shared.Auxiliary = None
    kv_dir: shared.KvDir = None
    method: shared.Method = None
    recompute_ratio: shared.RecomputeRatio = None
    max_new_tokens: int = Field(default=256, ge=1, description="The longest answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 decodes greedily.")
    top_p: shared.TopP = None
    top_k: shared.TopK = None
    seed: shared.Seed = None
    stop: shared.Stop = None
    context_window: int | None = Field(default=None, gt=0, description="None: the model's own.")
    prefix: shared.Prefix = None
    tenant: shared.Tenant = ""
    dtype: shared.Dtype = "auto"
    device: shared.Device = "auto"
    max_requests: shared.MaxRequests = 16
    fuse_when_idle: shared.FuseWhenIdle = False
    pydantic_program_mode: PydanticProgramMode = Field(
        default=PydanticProgramMode.LLM,
        description="How structured output is asked for: LLM as JSON, FUNCTION as a tool's arguments.",
    )

    _handle: EngineHandle = PrivateAttr()
    _last_report: Report | None = PrivateAttr(default=None)

    def __new__(cls, model_name: str | None = None, **fields: Any) -> Any:
        """Raises ImportError where ``base_url`` is given and LlamaIndex' client of OpenAI's API is not installed."""
        if cls is not CacheClipLLM or fields.get("base_url") is None:
            return super().__new__(cls)
        try:
            from .server import CacheClipServerLLM
        except ImportError as error:
            raise ImportError(f"{error}; base_url needs pip install 'llama-index-llms-cacheclip[server]'") from error
        return CacheClipServerLLM(model_name, **fields)

    def __init__(self, model_name: str | None = None, **fields: Any) -> None:
        """Raises `ConfigurationError` for a misspelt field, an unknown method, or a value that makes no sense."""
        if fields.pop("base_url", None) is not None:
            raise ConfigurationError("base_url is of CacheClipLLM itself: derive from CacheClipServerLLM")
        fields = fields if model_name is None else {"model_name": model_name, **fields}
        super().__init__(**shared.checked_fields(fields, type(self).model_fields, _ALSO_CALLED))
        self._attach(EngineHandle(EngineSettings.of(self.model_name, self)))

    @classmethod
    def from_engine(cls, engine: Engine, **fields: Any) -> CacheClipLLM:
        """An LLM around an engine that is open already; ``fields`` are those of an answer (``temperature``, ...)."""
        name = fields.pop("model_name", None) or fields.pop("model", None) or engine_name(engine)
        llm = cls(name, **fields)
        llm._attach(EngineHandle(engine=engine))
        return llm

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipLLM"

    @property
    def handle(self) -> EngineHandle:
        """What stands for the engine, whether it is open or not."""
        return self._handle

    @property
    def engine(self) -> Engine:
        """The engine behind it, opened now if need be. Raises what `cacheclip_rag.Engine` raises."""
        return self._handle.engine

    @property
    def metadata(self) -> LLMMetadata:
        backbone = self.engine.backbone
        return LLMMetadata(
            context_window=self.context_window or backbone.context_length,
            num_output=self.max_new_tokens,
            is_chat_model=bool(backbone.tokenizer.chat_template),
            is_function_calling_model=self._has_own_template and dialect_of(backbone) is not None,
            model_name=self.model_name,
        )

    @property
    def tokenizer_fn(self) -> Callable[[str], list[int]]:
        """For ``Settings.tokenizer``, so that LlamaIndex packs prompts by this model's tokens and not by another's."""
        return self._handle.token_ids

    def last_report(self) -> Report | None:
        """What happened in this object's latest finished call; each response carries its own in ``raw``."""
        return self._last_report

    def close(self) -> None:
        """Stop the engine's background work and let its memory go, unless another object still holds it.

        The next call opens it again.
        """
        self._handle.release()

    # ---- LlamaIndex calls these -------------------------------------------------------------------------------------
    # All eight are overridden: a request is counted once, and the async ones do not run the model on the event loop.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._answer(self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._answer(self._chat_request(messages, kwargs), _chat)

    @closes_its_stream
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return noted(self._stream(self._completion_request(prompt, formatted, kwargs), _completion))

    @closes_its_stream
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return noted(self._stream(self._chat_request(messages, kwargs), _chat))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await self._aanswer(lambda: self._completion_request(prompt, formatted, kwargs), _completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._aanswer(lambda: self._chat_request(messages, kwargs), _chat)

    @closes_its_stream
    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return noted(await self._astream(lambda: self._completion_request(prompt, formatted, kwargs), _completion))

    @closes_its_stream
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return noted(await self._astream(lambda: self._chat_request(messages, kwargs), _chat))

    # ---- tools ------------------------------------------------------------------------------------------------------

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Raises ValueError where there is no call, as LlamaIndex expects."""
        return selections(response, error_on_no_tool_call)

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``tool_choice``: ``"auto"``, ``"any"``, ``"none"`` or a tool's name."""
        asked = [ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg] if user_msg else []
        return {
            "messages": [*(chat_history or ()), *asked],
            "tools": offered(tools),
            "tool_choice": tool_choice or ("any" if tool_required else None),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    # ---- structured output ------------------------------------------------------------------------------------------
    # LlamaIndex's, with decoding that can write nothing but JSON of the class.

    def structured_predict(
        self, output_cls: type[BaseModel], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        return super().structured_predict(output_cls, prompt, _constrained(output_cls, llm_kwargs), **prompt_args)

    async def astructured_predict(
        self, output_cls: type[BaseModel], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        llm_kwargs = _constrained(output_cls, llm_kwargs)
        return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

    def _structured_stream_call(
        self, output_cls: type[BaseModel], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        program = get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode, tool_choice="any")
        return program.stream_call(llm_kwargs=_constrained(output_cls, llm_kwargs), **prompt_args)

    async def _structured_astream_call(
        self, output_cls: type[BaseModel], prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        program = get_program_for_llm(output_cls, prompt, self, self.pydantic_program_mode, tool_choice="any")
        return await program.astream_call(llm_kwargs=_constrained(output_cls, llm_kwargs), **prompt_args)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _answer(self, request: ChatRequest, respond: Respond[R], cancel: threading.Event | None = None) -> R:
        parsed, report = request.answer(cancel)
        self._over(report, active_span_id.get())
        return respond(parsed.text + _unread(parsed), None, parsed.calls, report)

    def _stream(
        self, request: ChatRequest, respond: Respond[R], cancel: threading.Event | None = None
    ) -> Generator[R, None, None]:
        """Wrong options raise here, not at the first ``next``."""
        return self._responses(request.stream(cancel), respond, active_span_id.get())

    def _responses(self, stream: AnswerStream, respond: Respond[R], span: str | None) -> Generator[R, None, None]:
        text = ""
        try:
            for delta in stream:
                text += delta
                yield respond(text, delta, (), stream.report)
            # only now are the tool calls, the token counts and the finish reason known
            delta = stream.rest.text + _unread(stream.rest)
            yield respond(text + delta, delta, stream.rest.calls, stream.report)
        finally:
            stream.close()
            self._over(stream.report, span)

    def _over(self, report: Report, span: str | None) -> None:
        self._last_report = report
        tell(self.model_name, report, span)

    async def _aanswer(self, request: Callable[[], ChatRequest], respond: Respond[R]) -> R:
        return await in_thread(lambda cancel: self._answer(request(), respond, cancel))

    async def _astream(self, request: Callable[[], ChatRequest], respond: Respond[R]) -> AsyncGenerator[R, None]:
        cancel = threading.Event()
        return pump(await asyncio.to_thread(lambda: self._stream(request(), respond, cancel)), cancel)

    def _completion_request(self, prompt: str, formatted: bool, kwargs: dict[str, Any]) -> ChatRequest:
        grammar, instruction = format_of(kwargs.pop("response_format", None))
        options = self._options(kwargs)
        if not formatted:
            prompt = f"{instruction}\n\n{prompt}" if instruction else prompt
            prompt = prompt if self.completion_to_prompt is None else self.completion_to_prompt(prompt)
        return ChatRequest(self.engine, prompt, guided(self.engine, grammar, options))

    def _chat_request(self, messages: Sequence[ChatMessage], kwargs: dict[str, Any]) -> ChatRequest:
        tools = offered(kwargs.pop("tools", None) or ())
        choice, parallel = kwargs.pop("tool_choice", None), kwargs.pop("parallel_tool_calls", None)
        wanted = kwargs.pop("response_format", None)
        options = self._options(kwargs)
        if self._has_own_template:
            return chat_request(
                self.engine,
                conversation(messages),
                options,
                tools=tools,
                tool_choice=choice,
                response_format=wanted,
                parallel_calls=parallel is not False,
            )
        if tools and choice != "none":
            raise NotImplementedError("messages_to_prompt is your own, and has no place for tools")
        grammar, instruction = format_of(wanted)
        told = [ChatMessage(instruction, role=MessageRole.SYSTEM)] if instruction else []
        assert self.messages_to_prompt is not None
        prompt = self.messages_to_prompt([*told, *messages])
        return ChatRequest(self.engine, prompt, guided(self.engine, grammar, options))

    @property
    def _has_own_template(self) -> bool:
        """Whether prompts are written by the model's chat template, and not by a function that somebody chose."""
        return isinstance(self.messages_to_prompt, ChatTemplate)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The engine's options for one call."""
        names = ("max_new_tokens", *shared.PER_CALL)
        return call_options(kwargs, {name: getattr(self, name) for name in names})

    def _attach(self, handle: EngineHandle) -> None:
        self._handle = handle
        if self.messages_to_prompt is None or _is_default(self.messages_to_prompt, generic_messages_to_prompt):
            self.messages_to_prompt = ChatTemplate(handle)
        if self.completion_to_prompt is None or _is_default(self.completion_to_prompt, default_completion_to_prompt):
            self.completion_to_prompt = UserTurn(handle)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)


def _is_default(function: Any, default: Any) -> bool:
    """Whether nobody chose the function: it is LlamaIndex's, or ours around an engine that was replaced."""
    return function is default or isinstance(function, (ChatTemplate, UserTurn))


def _completion(text: str, delta: str | None, calls: Sequence[Call], report: Report) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, raw=_raw(report))


def _chat(text: str, delta: str | None, calls: Sequence[Call], report: Report) -> ChatResponse:
    return ChatResponse(message=answer_message(text, calls), delta=delta, raw=_raw(report))


def _unread(parsed: Parsed) -> str:
    """Tool calls that cannot be read are text to LlamaIndex, which has no place for them."""
    return "".join(call.text for call in parsed.invalid)


def _constrained(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The options of a call that asks for JSON of this class; LlamaIndex's programs tell the model its schema."""
    wanted = schema_format(output_cls.model_json_schema(), output_cls.__name__, told=True)
    return {"response_format": wanted, **(llm_kwargs or {})}


def _raw(report: Report) -> dict[str, Any]:
    """``usage`` is where token counters look."""
    return {"usage": report.usage, "cacheclip": report.as_dict()}
