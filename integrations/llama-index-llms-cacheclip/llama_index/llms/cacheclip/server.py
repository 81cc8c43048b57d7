"""`CacheClipServerLLM`, which `CacheClipLLM(base_url=...)` makes: a model behind a server with chunk KV."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, TypeVar

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.instrumentation.span import active_span_id
from llama_index.llms.openai_like import OpenAILike
from openai import AsyncOpenAI, OpenAI

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.frameworks import fields as shared
from cacheclip_rag.report import Report
from cacheclip_rag.server.framework_clients import (
    PerProcess,
    ServerHandle,
    asked,
    report_in,
    server_fields,
    servers_errors,
    unreported,
    with_usage,
)

from .closing import closes_its_stream, noted
from .copies import restore
from .events import tell

R = TypeVar("R", ChatResponse, CompletionResponse)

_ALSO_CALLED = {
    "base_url": "api_base",
    "max_new_tokens": "max_tokens",
    "model_name": "model",
}
_CLIENTS = ("openai_client", "async_openai_client", "http_client", "async_http_client")
"""What LlamaIndex' client takes that is no field."""
_DEFAULTS: dict[str, Any] = {
    "model": "",
    "temperature": 0.0,
    "max_tokens": 256,
    "max_retries": 1,
    "timeout": 600.0,
    "is_chat_model": True,
    "is_function_calling_model": True,
    "should_use_structured_outputs": True,
}
"""Those of `CacheClipLLM`, and what servers can do: LlamaIndex' client would rather assume that they cannot."""


class CacheClipServerLLM(OpenAILike):
    """A model behind `cacheclip serve`, or behind vLLM with this library inside.

    It is LlamaIndex' own client of OpenAI's API: streaming, tools and structured output are what they are there. Each
    answer's report is asked for, too. ``CacheClipLLM(base_url=...)`` makes one. It is no `CacheClipLLM` with a field
    more, since of an engine's fields (``device``, ``kv_dir``) none means anything here, and these calls are OpenAI's.

    Without a ``model`` the server's first is asked. Set ``is_function_calling_model=False`` for a model whose chat
    template has no tools. Errors of the server are `ServerError`.
    """

    method: shared.Method = None
    recompute_ratio: shared.RecomputeRatio = None
    top_p: shared.TopP = None
    top_k: shared.TopK = None
    seed: shared.Seed = None
    stop: shared.Stop = None
    context_window: int | None = Field(default=None, gt=0, description="None: the server's.")  # type: ignore[assignment]
    api_key: str | None = Field(default=None, repr=False, description="The server's key, if it wants one.")

    _handle: ServerHandle = PrivateAttr()
    _open: PerProcess[OpenAI] = PrivateAttr(default_factory=PerProcess)
    _aopen: PerProcess[AsyncOpenAI] = PrivateAttr(default_factory=PerProcess)
    _last_report: Report | None = PrivateAttr(default=None)

    def __init__(self, model_name: str | None = None, **fields: Any) -> None:
        """Nothing is asked of the server yet. Raises `ConfigurationError` for a misspelt field, for one that only an
        engine of this process has, and for a value that makes no sense.
        """
        clients = {name: fields.pop(name) for name in _CLIENTS if name in fields}
        fields = fields if model_name is None else {"model_name": model_name, **fields}
        fields = server_fields(fields, type(self).model_fields, _ALSO_CALLED)
        key = fields.pop("api_key", None)
        handle = ServerHandle(fields.pop("api_base", ""), None if key == _NO_KEY else key)
        # A key of OpenAI's, which may be in the environment, is not for this server.
        own = {"api_base": handle.base_url, "api_key": key or _NO_KEY}
        super().__init__(**{**_DEFAULTS, **fields, **own, **clients})
        self._handle = handle

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipServerLLM"

    @property
    def handle(self) -> ServerHandle:
        """What stands for the server."""
        return self._handle

    @property
    def engine(self) -> NoReturn:
        """Always raises `ConfigurationError`: the engine is in the server's process."""
        return self._handle.engine

    @property
    def model_name(self) -> str:
        """The model's name. Raises `ServerError` if it is the server's to say and the server does not."""
        return self.model or self._handle.model()

    @property
    def metadata(self) -> LLMMetadata:
        """Raises `ServerError` if the context window is the server's to say and the server does not."""
        window = self.context_window or self._handle.context_length()
        known = {} if window is None else {"context_window": window}
        return LLMMetadata(
            **known,
            num_output=self.max_tokens or -1,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_function_calling_model,
            model_name=self.model_name,
        )

    @property
    def tokenizer_fn(self) -> Callable[[str], list[int]]:
        """For ``Settings.tokenizer``. Raises `ConfigurationError` without a ``tokenizer``: servers do not count."""
        if self._tokenizer is None:
            raise ConfigurationError(
                'the server\'s tokens are not known here: CacheClipLLM(base_url=..., tokenizer="its name on the hub")'
            )
        return self._tokenizer.encode

    def last_report(self) -> Report | None:
        """What happened in this object's latest finished call, as the server reports it: an `Unreported` where it does
        not, as vLLM's of streams. Each response carries its own in ``raw``.
        """
        return self._last_report

    def close(self) -> None:
        """Close the connections to the server. The next call opens new ones."""
        self._handle.close()
        self._open.clear()
        self._aopen.clear()

    # ---- LlamaIndex calls these: beneath them are callbacks, and beneath those the methods below --------------------

    @closes_its_stream
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return super().stream_complete(prompt, formatted, **kwargs)

    @closes_its_stream
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return super().stream_chat(messages, **kwargs)

    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        await self._described()
        return await super().acomplete(prompt, formatted, **kwargs)

    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        await self._described()
        return await super().achat(messages, **kwargs)

    @closes_its_stream
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        await self._described()
        return await super().astream_complete(prompt, formatted, **kwargs)

    @closes_its_stream
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        await self._described()
        return await super().astream_chat(messages, **kwargs)

    # ---- the client's requests --------------------------------------------------------------------------------------

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with self._errors():
            return self._finished(super()._chat(messages, **kwargs))

    def _complete(self, prompt: str, **kwargs: Any) -> CompletionResponse:
        with self._errors():
            return self._finished(super()._complete(prompt, **kwargs))

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        return noted(self._pieces(super()._stream_chat(messages, **kwargs), active_span_id.get()))

    def _stream_complete(self, prompt: str, **kwargs: Any) -> CompletionResponseGen:
        return noted(self._pieces(super()._stream_complete(prompt, **kwargs), active_span_id.get()))

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with self._errors():
            return self._finished(await super()._achat(messages, **kwargs))

    async def _acomplete(self, prompt: str, **kwargs: Any) -> CompletionResponse:
        with self._errors():
            return self._finished(await super()._acomplete(prompt, **kwargs))

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        return noted(self._apieces(await super()._astream_chat(messages, **kwargs), active_span_id.get()))

    async def _astream_complete(self, prompt: str, **kwargs: Any) -> CompletionResponseAsyncGen:
        return noted(self._apieces(await super()._astream_complete(prompt, **kwargs), active_span_id.get()))

    def _get_model_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        if "max_new_tokens" in kwargs:
            kwargs["max_tokens"] = kwargs.pop("max_new_tokens")
        own = {name: getattr(self, name) for name in ("top_p", "top_k", "seed", "stop")}
        own = {name: value for name, value in own.items() if value is not None}
        given = {**own, **super()._get_model_kwargs(**kwargs), **kwargs, "model": self.model_name}
        if given.get("stream"):
            given.setdefault("stream_options", {"include_usage": True})
        return asked(given, {"method": self.method, "recompute_ratio": self.recompute_ratio})

    def _get_client(self) -> OpenAI:
        if self._client is not None or not self.reuse_client:
            return super()._get_client()
        return self._open.get(lambda: OpenAI(**self._get_credential_kwargs()))

    def _get_aclient(self) -> AsyncOpenAI:
        """One an event loop, to which connections belong."""
        if self._aclient is not None or not self.reuse_client:
            return super()._get_aclient()
        loop = asyncio.get_running_loop()
        return self._aopen.get(lambda: AsyncOpenAI(**self._get_credential_kwargs(is_async=True)), loop)

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _described(self) -> None:
        """What is asked of the server once is asked now, off the event loop."""
        await asyncio.to_thread(lambda: self.metadata)

    def _errors(self) -> AbstractContextManager[None]:
        return servers_errors(self._handle.base_url)

    def _finished(self, response: R) -> R:
        report = report_in(response.raw)
        self._over(report or unreported(response.raw), active_span_id.get())
        return _with(response, report)

    def _pieces(self, pieces: Generator[R, None, None], span: str | None) -> Generator[R, None, None]:
        report: Report | None = None
        try:
            with self._errors():
                for piece in pieces:
                    report = report_in(piece.raw) or report
                    last = piece.raw
                    yield _with(piece, report)
            self._over(report or unreported(last), span)
        finally:
            pieces.close()

    async def _apieces(self, pieces: AsyncGenerator[R, None], span: str | None) -> AsyncGenerator[R, None]:
        report: Report | None = None
        try:
            with self._errors():
                async for piece in pieces:
                    report = report_in(piece.raw) or report
                    last = piece.raw
                    yield _with(piece, report)
            self._over(report or unreported(last), span)
        finally:
            await pieces.aclose()

    def _over(self, report: Report, span: str | None) -> None:
        self._last_report = report
        tell(self.model_name, report, span)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)
        for name in ("_client", "_aclient", "_http_client", "_async_http_client"):
            if name not in (state.get("__pydantic_private__") or {}):
                setattr(self, name, None)


_NO_KEY = "none"
"""OpenAI's client wants some key."""


def _with(response: R, report: Report | None) -> R:
    """The response with the report where `CacheClipLLM` has it."""
    if report is not None:
        report = with_usage(report, response.raw)
        response.raw = {**response.raw.model_dump(), "cacheclip": report.as_dict()}
    return response
