"""`ChatCacheClipServer`, which `ChatCacheClip(base_url=...)` makes: a chat model behind a server with chunk KV."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from langchain_core.language_models import BaseChatModel
from langchain_core.language_models.base import LangSmithParams
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import PrivateAttr, SecretStr

from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.frameworks import fields as shared
from cacheclip_rag.report import Report
from cacheclip_rag.server.framework_clients import (
    ServerHandle,
    asked,
    report_in,
    server_fields,
    servers_errors,
    unreported,
)
from cacheclip_rag.server.framework_clients.http_clients import AnyLoopClient, AnyProcessClient

_CLIENTS = ("client", "async_client", "root_client", "root_async_client", "http_client", "http_async_client")
_DEFAULTS: dict[str, Any] = {
    "model_name": "",
    "temperature": 0.0,
    "max_tokens": 256,
    "stream_usage": True,
    "use_responses_api": False,
}
"""Those of `ChatCacheClip`, and what LangChain's client would not assume of a server that is not OpenAI's."""
_NO_KEY = "none"
"""OpenAI's client wants some key."""


class ChatCacheClipServer(ChatOpenAI):
    """A chat model behind `cacheclip serve`, or behind vLLM with this library inside.

    It is LangChain's own client of OpenAI's API: streaming, tools and structured output are what they are there. Each
    answer's report is asked for, too. ``ChatCacheClip(base_url=...)`` makes one. It is no `ChatCacheClip` with a field
    more, since of an engine's fields (``device``, ``kv_dir``) none means anything here, and these calls are OpenAI's.

    Without a ``model`` the server's first is asked. Errors of the server are `ServerError`.
    """

    method: shared.Method = None
    recompute_ratio: shared.RecomputeRatio = None
    top_k: shared.TopK = None

    _handle: ServerHandle = PrivateAttr()
    _last_report: Any = PrivateAttr(default=None)

    def __init__(self, model: str | None = None, **fields: Any) -> None:
        """Nothing is asked of the server yet. Raises `ConfigurationError` for a misspelt field, for one that only an
        engine of this process has, and for a value that makes no sense.
        """
        fields = fields if model is None else {"model": model, **fields}
        known = type(self).model_fields
        aliases = {field.alias: name for name, field in known.items() if field.alias}
        fields = server_fields(fields, known, {**aliases, "max_new_tokens": "max_tokens"})
        key = fields.pop("openai_api_key", None)
        key = key.get_secret_value() if isinstance(key, SecretStr) else key
        if key is not None and not isinstance(key, str):
            raise ConfigurationError("api_key is a text")
        handle = ServerHandle(fields.pop("openai_api_base", ""), None if key == _NO_KEY else key)
        # A key of OpenAI's, which may be in the environment, is not for this server.
        own = {"openai_api_base": handle.base_url, "openai_api_key": key or _NO_KEY}
        super().__init__(**{**_DEFAULTS, **_http_clients(), **fields, **own})
        self._handle = handle

    @property
    def handle(self) -> ServerHandle:
        """What stands for the server."""
        return self._handle

    @property
    def engine(self) -> NoReturn:
        """Always raises `ConfigurationError`: the engine is in the server's process."""
        return self._handle.engine

    def last_report(self) -> Report | None:
        """What happened in this object's latest finished call, as the server reports it: an `Unreported` where it does
        not, as vLLM's of streams. Each message carries its own in `response_metadata`.
        """
        report: Report | None = self._last_report
        return report

    def close(self) -> None:
        """Close the connections for chunks. The next call opens new ones."""
        self._handle.close()

    # ---- what LangChain asks about it -------------------------------------------------------------------------------

    @classmethod
    def is_lc_serializable(cls) -> bool:
        return False

    @property
    def _llm_type(self) -> str:
        return "chat-cacheclip"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        names = ("method", "recompute_ratio", "top_k")
        own = {name: getattr(self, name) for name in names}
        return {**super()._identifying_params, **own, "base_url": self._handle.base_url}

    def _get_invocation_params(self, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """The key of LangChain's answer cache, too."""
        return {**self._identifying_params, **super()._get_invocation_params(stop=stop, **kwargs)}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_provider"] = "cacheclip"
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """Raises `ConfigurationError` without ``custom_get_token_ids``: LangChain would count OpenAI's tokens."""
        if self.custom_get_token_ids is None:
            raise ConfigurationError(
                "the server's tokens are not known here: ChatCacheClip(base_url=..., custom_get_token_ids=...)"
            )
        return self.custom_get_token_ids(text)

    def get_num_tokens_from_messages(self, messages: Sequence[BaseMessage], tools: Any = None, **_: Any) -> int:
        """One by one, by ``custom_get_token_ids``."""
        return BaseChatModel.get_num_tokens_from_messages(self, list(messages), tools)

    # ---- LangChain calls these --------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> ChatResult:
        with self._errors():
            return self._finished(super()._generate(*args, **kwargs))

    async def _agenerate(self, *args: Any, **kwargs: Any) -> ChatResult:
        await self._named()
        with self._errors():
            return self._finished(await super()._agenerate(*args, **kwargs))

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        pieces = _Pieces()
        with self._errors():
            for chunk in super()._stream(*args, **kwargs):
                pieces.note(chunk)
                yield chunk
        self._over(pieces)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        await self._named()
        pieces = _Pieces()
        with self._errors():
            async for chunk in super()._astream(*args, **kwargs):
                pieces.note(chunk)
                yield chunk
        self._over(pieces)

    def _get_request_payload(self, input_: Any, *, stop: list[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        if "max_new_tokens" in kwargs:
            kwargs["max_tokens"] = kwargs.pop("max_new_tokens")
        payload = {"top_k": self.top_k, **super()._get_request_payload(input_, stop=stop, **kwargs)}
        payload["model"] = payload["model"] or self._handle.model()
        return asked(payload, {"method": self.method, "recompute_ratio": self.recompute_ratio})

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        result = super()._create_chat_result(response, generation_info)
        report = report_in(response)
        if report is not None:
            result.generations[0].message.response_metadata["cacheclip"] = report.as_dict()
            self._last_report = report
        return result

    def _convert_chunk_to_generation_chunk(self, chunk: dict[str, Any], *args: Any) -> ChatGenerationChunk | None:
        made = super()._convert_chunk_to_generation_chunk(chunk, *args)
        report = report_in(chunk) or report_in(chunk.get("chunk"))  # in the events of structured output
        if made is not None and report is not None:
            made.message.response_metadata["cacheclip"] = report.as_dict()
            self._last_report = report
        return made

    # ---- inside -----------------------------------------------------------------------------------------------------

    async def _named(self) -> None:
        """What is asked of the server once is asked now, off the event loop."""
        if not self.model_name:
            await asyncio.to_thread(self._handle.model)

    def _finished(self, result: ChatResult) -> ChatResult:
        if "cacheclip" not in result.generations[0].message.response_metadata:
            self._last_report = unreported({"usage": (result.llm_output or {}).get("token_usage")})
        return result

    def _over(self, pieces: _Pieces) -> None:
        if not pieces.reported:
            self._last_report = unreported({"usage": pieces.usage})

    def _errors(self) -> AbstractContextManager[None]:
        return servers_errors(self._handle.base_url)

    def __getstate__(self) -> dict[Any, Any]:
        state = super().__getstate__()
        state["__dict__"] = {name: value for name, value in state["__dict__"].items() if name not in _CLIENTS}
        return state

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.update({**dict.fromkeys(_CLIENTS), **_http_clients()})
        self.validate_environment()  # makes clients

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ChatCacheClipServer:
        made = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made


def _http_clients() -> dict[str, Any]:
    """LangChain's own are one for all event loops, which a second one finds broken."""
    return {"http_client": AnyProcessClient(), "http_async_client": AnyLoopClient(), "openai_proxy": None}


class _Pieces:
    """What the pieces of a stream say beside its text."""

    def __init__(self) -> None:
        self.reported = False
        self.usage: dict[str, int] = {}

    def note(self, piece: ChatGenerationChunk) -> None:
        message: Any = piece.message
        self.reported |= "cacheclip" in message.response_metadata
        if usage := message.usage_metadata:
            self.usage = {"prompt_tokens": usage["input_tokens"], "completion_tokens": usage["output_tokens"]}
