"""`ChatCacheClip`: a local chat model that finds known chunks in its prompt and reuses their KV."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough, run_in_executor
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import Field, PrivateAttr, field_validator

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.frameworks import EngineHandle, EngineSettings, check_fields, encoding_of, pump, read_options

from .grammar import Node
from .guide import Guide, call_grammar
from .messages import render, with_instruction
from .request import Request, choice_of, format_of, json_schema, metadata_of, title_of, usage_of
from .tools import Parsed, dialect_of

if TYPE_CHECKING:
    import builtins

    from cacheclip_rag.engine import Engine
    from cacheclip_rag.report import Report

_METHODS = ("json_schema", "function_calling", "json_mode")


_FOREIGN = {"stream", "streaming", "stream_usage", "timeout", "max_retries", "api_key", "strict", "parallel_tool_calls"}
"""What callers pass as a matter of course and what means nothing to a local model."""


class ChatCacheClip(BaseChatModel):
    """A local chat model that reads a document chunk once and keeps its KV.

    Chunks are recognised by their text in the final prompt, so chains, retrievers and agents work unchanged. Weights
    are loaded at the first use, once per process for all objects that ask for the same model and KV folder.

    Example:
        ``llm = ChatCacheClip(model="qwen2.5-coder-0.5b-instruct", kv_dir=".cacheclip")``

    """

    model: str = Field(description="A catalogue name, hub id, folder or GGUF file.")
    auxiliary: str | None = Field(default=None, description="The small model that selects tokens to recompute.")
    kv_dir: str | None = Field(default=None, description="The folder that keeps chunk KV; None: in memory only.")
    method: str | None = Field(
        default=None, description='How to select tokens, as in "cacheclip:window=16"; None: the engine\'s default.'
    )
    recompute_ratio: float | None = Field(
        default=None, description="Share of chunk tokens to recompute, 0 to 1; None: the method's default."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="The longest answer; None: 256 tokens.")
    temperature: float | None = Field(default=None, ge=0.0, description="None or 0 decodes greedily.")
    top_p: float | None = Field(default=None, description="For sampling: the likeliest tokens of this mass only.")
    top_k: int | None = Field(default=None, description="For sampling: the so many likeliest tokens only.")
    stop: list[str] | None = Field(default=None, description="Strings that end an answer.")
    streaming: bool = Field(default=False, description="Let `invoke` stream inside, so that callbacks see tokens.")
    prefix: str | None = Field(
        default=None, description="The text chunks are encoded behind; None: what opens the model's chat template."
    )
    tenant: str = Field(default="", description="Separates chunk KV of different owners.")
    dtype: str = Field(default="auto", description='"float32", "bfloat16", ..., or "auto".')
    device: str = Field(default="auto", description='"cpu", "cuda", ..., or "auto".')
    max_requests: int = Field(default=16, ge=1, description="In flight at the same time; further ones wait.")
    fuse_when_idle: bool = Field(
        default=False,
        description="While nothing is asked, fuse chunks with those they often come with (`auto` takes them).",
    )
    # A field, because configurable_fields() makes models anew from their fields.
    given: EngineHandle | None = Field(default=None, exclude=True, repr=False, description="See `from_engine`.")

    _last_report: Any = PrivateAttr(default=None)

    def __init__(self, model: str, **fields: Any) -> None:
        """Raises `ConfigurationError` for a misspelt field, an unknown method, or a value that makes no sense."""
        if "max_new_tokens" in fields:
            fields.setdefault("max_tokens", fields.pop("max_new_tokens"))
        check_fields(fields, type(self).model_fields, _FOREIGN)
        encoding_of(fields.get("method"))
        read_options({name: fields.get(name) for name in _PER_CALL})
        super().__init__(**{"model": model, **fields})

    @classmethod
    def from_engine(cls, engine: Engine, **fields: Any) -> ChatCacheClip:
        """A chat model around an engine that is open already; ``fields`` are those of an answer (``stop``, ...)."""
        name = fields.pop("model", None) or engine.backbone.model.name_or_path or engine.backbone.config.model_type
        return cls(name, given=EngineHandle(engine=engine), **fields)

    @field_validator("kv_dir", mode="before")
    @classmethod
    def _path(cls, kv_dir: Any) -> Any:
        return os.fspath(kv_dir) if isinstance(kv_dir, os.PathLike) else kv_dir

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("dtype", mode="before")
    @classmethod
    def _name(cls, dtype: Any) -> str:
        return str(dtype).removeprefix("torch.")

    @property
    def handle(self) -> EngineHandle:
        """What stands for the engine, whether it is open or not."""
        return self.given or EngineHandle(self._settings())

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
        names = ("model", "auxiliary", *_PER_CALL, "prefix", "tenant", "dtype")
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
        ids: list[int] = self.engine.backbone.tokenise(text).ids.tolist()
        return ids

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """What ``usage_metadata["input_tokens"]`` will be: the chat template and the tools are counted too."""
        backbone = self.engine.backbone
        prompt = render(backbone, messages, [convert_to_openai_tool(tool) for tool in tools or ()])
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
        if dialect_of(self.engine.backbone) is None:
            raise NotImplementedError(f"the chat template of {self.model} has no tool calls that can be read")
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
            wanted = {"type": "json_schema", "json_schema": {"name": title_of(schema), "schema": json_schema(schema)}}
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
        cancel = threading.Event()
        try:
            return await run_in_executor(None, self._answer, messages, stop, kwargs, cancel)
        finally:
            cancel.set()  # a thread cannot be cancelled; the engine looks at this between two tokens

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
        request = self._request(messages, stop, kwargs)
        answer = request.engine.generate(request.prompt, cancel=cancel, **request.options)
        self._last_report = answer.report
        parsed = request.parse(answer.text)
        message = AIMessage(
            content=parsed.text,
            tool_calls=parsed.calls,
            invalid_tool_calls=parsed.invalid,
            usage_metadata=usage_of(answer.report),
            response_metadata=metadata_of(request.model, answer.report, parsed),
        )
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _chunks(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        kwargs: builtins.dict[str, Any],
        cancel: threading.Event | None = None,
    ) -> Generator[ChatGenerationChunk, None, None]:
        request = self._request(messages, stop, kwargs)
        reader = request.reader()
        with request.engine.stream(request.prompt, cancel=cancel, **request.options) as stream:
            self._last_report = stream.report
            for delta in stream:
                text = delta if reader is None else reader.feed(delta)
                if text:
                    yield ChatGenerationChunk(message=AIMessageChunk(content=text))
            parsed = Parsed() if reader is None else reader.close()
            # Counts go into one chunk only, since LangChain adds up those of all.
            last = AIMessageChunk(
                content=parsed.text,
                tool_call_chunks=parsed.chunks,
                usage_metadata=usage_of(stream.report),
                response_metadata=metadata_of(request.model, stream.report, parsed),
                chunk_position="last",
            )
            yield ChatGenerationChunk(message=last)

    def _request(self, messages: list[BaseMessage], stop: list[str] | None, kwargs: builtins.dict[str, Any]) -> Request:
        """Raises `ConfigurationError`, `PromptError`, NotImplementedError, and what opening an engine raises."""
        kwargs = dict(kwargs)
        model, tools = kwargs.pop("model", None) or self.model, kwargs.pop("tools", None) or []
        choice, wanted = kwargs.pop("tool_choice", None), kwargs.pop("response_format", None)
        options = self._options({**kwargs, "stop": stop if stop is not None else kwargs.get("stop")})
        engine = (self.handle if model == self.model else EngineHandle(replace(self._settings(), model=model))).engine
        tools = [convert_to_openai_tool(tool) for tool in tools]
        choice = choice_of(choice, tools)
        dialect = None
        if tools and choice != "none":
            dialect = dialect_of(engine.backbone)
            if dialect is None:
                raise NotImplementedError(f"the chat template of {model} has no tool calls that can be read")
        grammar: Node | None = None
        if wanted is not None:
            grammar, instruction = format_of(wanted)
            messages = with_instruction(engine.backbone, messages, instruction) if instruction else messages
        if dialect is not None and choice is not None:
            grammar = call_grammar(dialect, tools, None if choice == "any" else choice)
        if grammar is not None:
            sample = bool(options.get("do_sample", options.get("temperature")))
            options.update(Guide(engine.backbone, grammar, options["max_new_tokens"], sample).options())
        prompt = render(engine.backbone, messages, tools if dialect is not None else ())
        names = frozenset(tool["function"]["name"] for tool in tools)
        return Request(engine, model, prompt, options, dialect, names)

    def _options(self, kwargs: builtins.dict[str, Any]) -> builtins.dict[str, Any]:
        """The engine's options for one call: what the call says, then what the fields say."""
        call = read_options({name: value for name, value in kwargs.items() if not name.startswith("ls_")}, _FOREIGN)
        own: dict[str, Any] = {"max_new_tokens": self.max_tokens or 256, "stop": self.stop}
        own.update(top_p=self.top_p, top_k=self.top_k)
        if "method" not in call:  # the fields' ratio belongs to the fields' method
            own.update(method=self.method, recompute_ratio=self.recompute_ratio)
        if self.temperature or not call.get("do_sample"):  # sampling at temperature 0 is no sampling
            own["temperature"] = self.temperature
        return {name: value for name, value in {**own, **call}.items() if value is not None}

    def _settings(self) -> EngineSettings:
        """Fields that need an engine of their own; the others can differ from call to call on one engine."""
        return EngineSettings(
            model=self.model,
            auxiliary=self.auxiliary,
            kv_dir=None if self.kv_dir is None else os.path.abspath(os.path.expanduser(self.kv_dir)),
            method=encoding_of(self.method),
            prefix=self.prefix,
            tenant=self.tenant,
            dtype=self.dtype,
            device=self.device,
            max_requests=self.max_requests,
            fuse_when_idle=self.fuse_when_idle,
        )


_PER_CALL = ("method", "recompute_ratio", "max_tokens", "temperature", "top_p", "top_k", "stop")
"""Fields that a call can override."""
