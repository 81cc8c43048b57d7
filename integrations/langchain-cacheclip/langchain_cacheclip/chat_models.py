"""`ChatCacheClip`: a local chat model that finds known chunks in its prompt and reuses their KV."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import Field, PrivateAttr

from cacheclip_rag.errors import ConfigurationError, PromptError
from cacheclip_rag.frameworks import (
    ChatRequest,
    EngineHandle,
    EngineSettings,
    call_options,
    chat_request,
    engine_name,
    in_thread,
    needed_dialect,
    pump,
)
from cacheclip_rag.frameworks import fields as shared
from cacheclip_rag.frameworks.messages import render
from cacheclip_rag.frameworks.structured.formats import choice_of, schema_format

from .answers import answer_message, last_chunk
from .messages import conversation

if TYPE_CHECKING:
    import builtins

    from cacheclip_rag.engine import Engine
    from cacheclip_rag.report import Report

_METHODS = ("json_schema", "function_calling", "json_mode")


_FOREIGN = {"stream", "streaming", "stream_usage", "timeout", "max_retries", "api_key", "strict"}
"""What callers pass as a matter of course and what means nothing to a local model."""

_ALSO_CALLED = {"max_new_tokens": "max_tokens", "model_name": "model"}
"""LlamaIndex's names of fields."""


class ChatCacheClip(BaseChatModel):
    """A local chat model that reads a document chunk once and keeps its KV.

    Chunks are recognised by their text in the final prompt, so chains, retrievers and agents work unchanged. Weights
    are loaded at the first use, once per process for all objects that ask for the same model and KV folder.

    With ``base_url`` it is a model behind a server, and the object a `ChatCacheClipServer`, which is used the same way.

    Example:
        ``llm = ChatCacheClip(model="qwen2.5-coder-0.5b-instruct", kv_dir=".cacheclip")``
        ``llm = ChatCacheClip(base_url="http://localhost:8000/v1", api_key="...")``

    """

    model: shared.ModelName
    auxiliary: shared.Auxiliary = None
    kv_dir: shared.KvDir = None
    method: shared.Method = None
    recompute_ratio: shared.RecomputeRatio = None
    max_tokens: int | None = Field(default=None, ge=1, description="The longest answer; None: 256 tokens.")
    temperature: float | None = Field(default=None, ge=0.0, description="None or 0 decodes greedily.")
    top_p: shared.TopP = None
    top_k: shared.TopK = None
    seed: shared.Seed = None
    stop: shared.Stop = None
    streaming: bool = Field(default=False, description="Let `invoke` stream inside, so that callbacks see tokens.")
    prefix: shared.Prefix = None
    tenant: shared.Tenant = ""
    dtype: shared.Dtype = "auto"
    device: shared.Device = "auto"
    max_requests: shared.MaxRequests = 16
    fuse_when_idle: shared.FuseWhenIdle = False
    # A field, because configurable_fields() makes models anew from their fields.
    given: EngineHandle | None = Field(default=None, exclude=True, repr=False, description="See `from_engine`.")

    _last_report: Any = PrivateAttr(default=None)

    def __new__(cls, model: str | None = None, **fields: Any) -> Any:
        """Raises ImportError where ``base_url`` is given and LangChain's client of OpenAI's API is not installed."""
        if cls is not ChatCacheClip or fields.get("base_url") is None:
            return super().__new__(cls)
        try:
            from .server import ChatCacheClipServer
        except ImportError as error:
            raise ImportError(f"{error}; base_url needs pip install 'langchain-cacheclip[server]'") from error
        return ChatCacheClipServer(model, **fields)

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        """Raises `ConfigurationError` for a misspelt field, an unknown method, or a value that makes no sense."""
        if fields.pop("base_url", None) is not None:
            raise ConfigurationError("base_url is of ChatCacheClip itself: derive from ChatCacheClipServer")
        fields = fields if model is None else {"model": model, **fields}
        super().__init__(**shared.checked_fields(fields, type(self).model_fields, _ALSO_CALLED, _FOREIGN))

    @classmethod
    def from_engine(cls, engine: Engine, **fields: Any) -> ChatCacheClip:
        """A chat model around an engine that is open already; ``fields`` are those of an answer (``stop``, ...)."""
        name = fields.pop("model", None) or fields.pop("model_name", None) or engine_name(engine)
        return cls(name, given=EngineHandle(engine=engine), **fields)

    @property
    def handle(self) -> EngineHandle:
        """What stands for the engine, whether it is open or not."""
        return self.given or EngineHandle(EngineSettings.of(self.model, self))

    @property
    def engine(self) -> Engine:
        """The engine behind it, opened now if need be. Raises what `cacheclip_rag.Engine` raises."""
        return self.handle.engine

    def last_report(self) -> Report | None:
        """What happened in this object's latest call; each message carries its own in `response_metadata`."""
        report: Report | None = self._last_report
        return report

    def close(self) -> None:
        """Stop the engine's background work and let its memory go, unless another object still holds it.

        The next call opens it again.
        """
        self.handle.release()

    # ---- what LangChain asks about it -------------------------------------------------------------------------------

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    @property
    def _llm_type(self) -> str:
        return "chat-cacheclip"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        """Everything that an answer depends on: it is the key of LangChain's answer cache, and what traces show."""
        names = ("model", "auxiliary", "max_tokens", *shared.PER_CALL, "prefix", "tenant", "dtype")
        params: builtins.dict[str, Any] = {name: getattr(self, name) for name in names}
        params["stop_sequences"] = params.pop("stop")  # LangChain puts the call's, None for most, in place of "stop"
        if self.given is not None and (engine := self.given.peek()) is not None:
            params["method"] = self.method or repr(engine.method)
            if self.recompute_ratio is None and self.method is None:
                params["recompute_ratio"] = engine.recompute_ratio
            params["engine"] = engine.library.namespace.digest if engine.composable else self.given.token
        return params

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "cacheclip"
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """This model's tokens, unless ``custom_get_token_ids`` says otherwise."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        return self.handle.token_ids(text)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """What ``usage_metadata["input_tokens"]`` will be: the chat template and the tools are counted too.

        Messages that are no conversation to the template, as `trim_messages` makes them, are counted as LangChain
        counts: one by one.
        """
        if not messages:
            return 0
        backbone = self.engine.backbone
        try:
            prompt = render(backbone, conversation(messages), [convert_to_openai_tool(tool) for tool in tools or ()])
        except PromptError:
            return super().get_num_tokens_from_messages(messages)
        return len(backbone.tokenise_prompt(prompt))

    # ---- tools and structured output --------------------------------------------------------------------------------

    def bind_tools(
        self,
        tools: Sequence[builtins.dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: builtins.dict[str, Any] | str | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Tools for the model's chat template, which says how they are offered and how calls are written.

        ``tool_choice``: None or ``"auto"`` leaves it to the model, ``"any"`` or a tool's name makes it write a call
        whose arguments have the tool's schema, ``"none"`` offers no tool.

        Opens the engine, since the template comes with the weights. Raises NotImplementedError for a model whose
        template has no tools, `ConfigurationError` for a choice that is no tool, and what opening an engine raises.
        """
        needed_dialect(self.engine)
        offered = [convert_to_openai_tool(tool) for tool in tools]
        choice = choice_of(tool_choice, offered)
        if choice is not None:
            kwargs["tool_choice"] = choice
        return self.bind(tools=offered, **kwargs)

    def with_structured_output(
        self,
        schema: builtins.dict[str, Any] | type,
        *,
        include_raw: bool = False,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, builtins.dict[str, Any] | Any]:
        """A runnable whose answers have the shape of ``schema``: decoding can write nothing else.

        ``method``: ``"json_schema"`` works with every model; ``"function_calling"`` needs a chat template with tools;
        ``"json_mode"`` guarantees a JSON object only, and the prompt has to say which. ``strict`` is always so.

        Raises ValueError for unknown arguments, and NotImplementedError for ``"function_calling"`` without tools.
        """
        if kwargs:
            raise ValueError(f"Received unsupported arguments {kwargs}")
        if method not in _METHODS:
            raise ConfigurationError(f'method must be one of {", ".join(_METHODS)}, not "{method}"')
        if method == "function_calling":
            return super().with_structured_output(schema, include_raw=include_raw)
        if method == "json_mode":
            wanted: dict[str, Any] = {"type": "json_object"}
        else:
            wanted = schema_format(_json_schema(schema), _title(schema))
        about = {"kwargs": {"method": method}, "schema": schema}
        model = self.bind(response_format=wanted, ls_structured_output_format=about)
        parser: BaseOutputParser[Any] = JsonOutputParser()
        if isinstance(schema, type) and is_basemodel_subclass(schema):
            parser = PydanticOutputParser(pydantic_object=schema)
        if not include_raw:
            return model | parser
        parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
        failed = RunnablePassthrough.assign(parsed=lambda _: None)
        return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")

    # ---- LangChain calls these --------------------------------------------------------------------------------------
    # None of them calls on_llm_new_token: LangChain does, for every chunk, and would count it twice.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(messages, stop, kwargs)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        yield from self._chunks(messages, stop, kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await in_thread(lambda cancel: self._answer(messages, stop, kwargs, cancel))

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        cancel = threading.Event()
        async for chunk in pump(self._chunks(messages, stop, kwargs, cancel), cancel):
            yield chunk

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _answer(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: builtins.dict[str, Any],
        cancel: threading.Event | None = None,
    ) -> ChatResult:
        model, request = self._request(messages, stop, kwargs)
        parsed, self._last_report = request.answer(cancel)
        return ChatResult(generations=[ChatGeneration(message=answer_message(model, parsed, self._last_report))])

    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: builtins.dict[str, Any],
        cancel: threading.Event | None = None,
    ) -> Generator[ChatGenerationChunk, None, None]:
        model, request = self._request(messages, stop, kwargs)
        with request.stream(cancel) as stream:
            self._last_report = stream.report
            for text in stream:
                yield ChatGenerationChunk(message=AIMessageChunk(content=text))
            yield ChatGenerationChunk(message=last_chunk(model, stream.rest, stream.report))

    def _request(
        self, messages: list[BaseMessage], stop: list[str] | None, kwargs: builtins.dict[str, Any]
    ) -> tuple[str, ChatRequest]:
        """The model's name and what it is asked.

        Raises `ConfigurationError`, `PromptError`, NotImplementedError, and what opening an engine raises.
        """
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("ls_")}
        model, tools = kwargs.pop("model", None) or self.model, kwargs.pop("tools", None) or []
        asked = {name: kwargs.pop(name, None) for name in ("tool_choice", "response_format")}
        parallel = kwargs.pop("parallel_tool_calls", None)
        own = {name: getattr(self, name) for name in shared.PER_CALL}
        own["max_new_tokens"] = self.max_tokens or 256
        options = call_options({**kwargs, "stop": stop if stop is not None else kwargs.get("stop")}, own, _FOREIGN)
        handle = self.handle if model == self.model else EngineHandle(EngineSettings.of(model, self))
        return model, chat_request(
            handle.engine,
            conversation(messages),
            options,
            tools=[convert_to_openai_tool(tool) for tool in tools],
            parallel_calls=parallel is not False,
            **asked,
        )


def _json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema of a pydantic model, a typed dict, a function, or of what is one already."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        described: dict[str, Any] = schema.model_json_schema()
        return described
    if isinstance(schema, dict) and "function" not in schema and "parameters" not in schema:
        return schema
    return convert_to_json_schema(schema)


def _title(schema: Any) -> str:
    """What an answer of this shape is called."""
    return str(schema.get("title", "answer")) if isinstance(schema, dict) else getattr(schema, "__name__", "answer")
