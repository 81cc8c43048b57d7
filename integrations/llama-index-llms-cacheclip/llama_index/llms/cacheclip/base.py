"""`CacheClipLLM`: a local model that finds known chunks in its prompt and reuses their KV."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial
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
from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_validator
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt

from cacheclip_rag.frameworks import EngineHandle, EngineSettings, check_fields, encoding_of, pump, read_options

from .closing import closes_its_stream, noted
from .engines import restore
from .events import tell
from .prompts import ChatTemplate, UserTurn

if TYPE_CHECKING:
    from cacheclip_rag.engine import Engine
    from cacheclip_rag.report import Report
    from cacheclip_rag.serving.decoding import TextStream

R = TypeVar("R")
Respond: TypeAlias = "Callable[[str, str | None, Report], R]"
"""Makes a response of the text so far, what is new of it, and the report."""


class CacheClipLLM(CustomLLM):
    """A local model that reads a document chunk once and keeps its KV.

    Chunks are recognised by their text in the final prompt, so query engines, chat engines and agents work unchanged.
    Weights are loaded at the first use, once per process for all objects that ask for the same model and KV folder.

    Example:
        ``llm = CacheClipLLM(model_name="qwen2.5-coder-0.5b-instruct", kv_dir=".cacheclip")``

    """

    model_name: str = Field(description="A catalogue name, hub id, folder or GGUF file.")
    auxiliary: str | None = Field(default=None, description="The small model that selects tokens to recompute.")
    kv_dir: str | None = Field(default=None, description="The folder that keeps chunk KV; None: in memory only.")
    method: str | None = Field(default=None, description="How to select tokens; None: the engine's default.")
    recompute_ratio: float | None = Field(
        default=None, description="Share of chunk tokens to recompute, 0 to 1; None: the method's default."
    )
    max_new_tokens: int = Field(default=256, ge=1, description="The longest answer.")
    temperature: float = Field(default=0.0, ge=0.0, description="0 decodes greedily.")
    stop: list[str] | None = Field(default=None, description="Strings that end an answer.")
    context_window: int | None = Field(default=None, gt=0, description="None: the model's own.")
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

    _handle: EngineHandle = PrivateAttr()
    _last_report: Report | None = PrivateAttr(default=None)

    def __init__(self, model_name: str, **fields: Any) -> None:
        """Raises `ConfigurationError` for a misspelt field, an unknown method, or a ratio outside 0..1."""
        check_fields(fields, type(self).model_fields)
        encoding_of(fields.get("method"))
        read_options({"recompute_ratio": fields.get("recompute_ratio")})
        super().__init__(model_name=model_name, **fields)
        self._attach(EngineHandle(self._settings()))

    @classmethod
    def from_engine(cls, engine: Engine, **fields: Any) -> CacheClipLLM:
        """An LLM around an engine that is open already; ``fields`` are those of an answer (``temperature``, ...)."""
        fields.setdefault("model_name", engine.backbone.model.name_or_path or engine.backbone.config.model_type)
        llm = cls(**fields)
        llm._attach(EngineHandle(engine=engine))
        return llm

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipLLM"

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
            is_function_calling_model=False,
            model_name=self.model_name,
        )

    @property
    def tokenizer_fn(self) -> Callable[[str], list[int]]:
        """For ``Settings.tokenizer``, so that LlamaIndex packs prompts by this model's tokens and not by another's."""
        return partial(_token_ids, self.engine)

    def last_report(self) -> Report | None:
        """What happened in this object's latest finished call; each response carries its own in ``raw``."""
        return self._last_report

    def close(self) -> None:
        """Stop the engine's background work and let its memory go, unless another object still holds it.

        The next call opens it again.
        """
        self._handle.release()

    # ---- LlamaIndex calls these -------------------------------------------------------------------------------------
    # All eight are overridden: CustomLLM's chat calls its complete, which would count every request twice, and its
    # async methods run the model on the event loop.

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return self._answer(self._completion_prompt(prompt, formatted), kwargs, _completion)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._answer(self._chat_prompt(messages), kwargs, _chat)

    @closes_its_stream
    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return noted(self._stream(self._completion_prompt(prompt, formatted), kwargs, _completion))

    @closes_its_stream
    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return noted(self._stream(self._chat_prompt(messages), kwargs, _chat))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await self._aanswer(lambda: self._completion_prompt(prompt, formatted), kwargs, _completion)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return await self._aanswer(lambda: self._chat_prompt(messages), kwargs, _chat)

    @closes_its_stream
    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return noted(await self._astream(lambda: self._completion_prompt(prompt, formatted), kwargs, _completion))

    @closes_its_stream
    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return noted(await self._astream(lambda: self._chat_prompt(messages), kwargs, _chat))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _answer(
        self, prompt: str, kwargs: dict[str, Any], respond: Respond[R], cancel: threading.Event | None = None
    ) -> R:
        answer = self.engine.generate(prompt, cancel=cancel, **self._options(kwargs))
        self._over(answer.report, active_span_id.get())
        return respond(answer.text, None, answer.report)

    def _stream(
        self, prompt: str, kwargs: dict[str, Any], respond: Respond[R], cancel: threading.Event | None = None
    ) -> Generator[R, None, None]:
        """Wrong options raise here, not at the first ``next``."""
        stream = self.engine.stream(prompt, cancel=cancel, **self._options(kwargs))
        return self._responses(stream, respond, active_span_id.get())

    def _responses(self, stream: TextStream, respond: Respond[R], span: str | None) -> Generator[R, None, None]:
        text = ""
        try:
            for delta in stream:
                text += delta
                yield respond(text, delta, stream.report)
            yield respond(text, "", stream.report)  # only now are the token counts and the finish reason known
        finally:
            stream.close()
            self._over(stream.report, span)

    def _over(self, report: Report, span: str | None) -> None:
        self._last_report = report
        tell(self.model_name, report, span)

    async def _aanswer(self, prompt: Callable[[], str], kwargs: dict[str, Any], respond: Respond[R]) -> R:
        cancel = threading.Event()
        try:
            return await asyncio.to_thread(lambda: self._answer(prompt(), kwargs, respond, cancel))
        finally:
            cancel.set()  # a thread cannot be cancelled; the engine looks at this between two tokens

    async def _astream(
        self, prompt: Callable[[], str], kwargs: dict[str, Any], respond: Respond[R]
    ) -> AsyncGenerator[R, None]:
        cancel = threading.Event()
        return pump(await asyncio.to_thread(lambda: self._stream(prompt(), kwargs, respond, cancel)), cancel)

    def _completion_prompt(self, prompt: str, formatted: bool) -> str:
        return prompt if formatted or self.completion_to_prompt is None else self.completion_to_prompt(prompt)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> str:
        assert self.messages_to_prompt is not None
        return self.messages_to_prompt(messages)

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The engine's options for one call: what the call says, then what the fields say."""
        call = read_options(kwargs)
        own: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        if "method" not in call:  # the fields' ratio belongs to the fields' method
            own.update(method=self.method, recompute_ratio=self.recompute_ratio)
        if self.temperature or not call.get("do_sample"):  # sampling at temperature 0 is no sampling
            own["temperature"] = self.temperature
        return {name: value for name, value in {**own, **call}.items() if value is not None}

    def _settings(self) -> EngineSettings:
        """Fields that need an engine of their own; the others can differ from call to call on one engine."""
        return EngineSettings(
            model=self.model_name,
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


def _completion(text: str, delta: str | None, report: Report) -> CompletionResponse:
    return CompletionResponse(text=text, delta=delta, raw=_raw(report))


def _chat(text: str, delta: str | None, report: Report) -> ChatResponse:
    message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
    return ChatResponse(message=message, delta=delta, raw=_raw(report))


def _raw(report: Report) -> dict[str, Any]:
    """``usage`` is where token counters look."""
    return {"usage": report.usage, "cacheclip": report.as_dict()}


def _token_ids(engine: Engine, text: str) -> list[int]:
    ids: list[int] = engine.backbone.tokenise(text).ids.tolist()
    return ids
