"""A client of the endpoints for chunks and documents, of `cacheclip serve` and of vLLM with this library inside."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

from ..errors import ConfigurationError, ServerError
from .service import Added, ChunkStats, Replaced, Skipped

try:
    import httpx
except ImportError as error:  # it comes with both frameworks
    raise ImportError("ChunkClient needs httpx: pip install 'cacheclip-rag[serve]'") from error

_BATCH = 2 << 20
"""Characters of texts in one request of `add`: each has twelve bytes at most, and servers refuse bodies above 32 MB."""

_TIMEOUT = httpx.Timeout(10, read=None)
"""Chunks take as long as the model takes to read them."""

_STATS = ("GET", "/chunks/stats", b"")
_MODELS = ("GET", "/models", b"")

Call = tuple[str, str, bytes]
"""Method, path, body."""


class ChunkClient:
    """Chunks and documents of a server. ``base_url`` and ``api_key`` are those of an OpenAI client.

    All that a method asks may be repeated: what is stored already is not encoded again. Methods raise `ServerError`, in
    the server's own words, with its ``status``; `ConfigurationError` for a document id that no path can hold.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, client: httpx.Client | None = None) -> None:
        self._base, self._headers = root(base_url), _key(api_key)
        self._client = client or httpx.Client(timeout=_TIMEOUT)

    def add(self, texts: Iterable[str], document: str | None = None) -> Added:
        """Store the KV of these chunks, as parts of this document if one is named; in several requests if need be."""
        return _sum(_added(self._ask(call), start) for start, call in _adding(texts, document))

    def replace(self, document: str, texts: Iterable[str]) -> Replaced:
        """Let the document have these chunks and no others."""
        answer = self._ask(_document("PUT", document, {"texts": _listed(texts)}))
        return Replaced(**vars(_added(answer)), removed=answer["removed"])

    def forget(self, texts: Iterable[str], document: str | None = None) -> None:
        """Delete the KV of these chunks, whatever documents they are parts of. With a ``document`` they are no parts of
        it any longer, and the KV of those goes that no other document has.
        """
        self._ask(_forgetting(texts, document))

    def forget_document(self, document: str) -> None:
        """Delete the document's chunks, except those that another document has as well."""
        self._ask(_document("DELETE", document))

    def fuse(self, neighbours: Mapping[str, Iterable[str]] | None = None) -> Added:
        """Store a variant of each of these chunks, computed behind its neighbours (see `Engine.fuse`); None: of those
        that were used together.
        """
        return _added(self._ask(_fusing(neighbours)))

    def stats(self) -> ChunkStats:
        return ChunkStats(**self._ask(_STATS))

    def models(self) -> list[dict[str, Any]]:
        """What the server says of its models, the one that answers first: ``id`` and, of vLLM's and of ours,
        ``max_model_len``, the tokens that its window has room for.
        """
        return list(self._ask(_MODELS)["data"])

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> ChunkClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: Call) -> dict[str, Any]:
        method, path, body = call
        try:
            return _answer(self._client.request(method, self._base + path, content=body, headers=self._headers))
        except httpx.HTTPError as error:
            raise _unreachable(self._base, error) from error


class AsyncChunkClient:
    """As `ChunkClient`, for ``await``."""

    def __init__(self, base_url: str, api_key: str | None = None, *, client: httpx.AsyncClient | None = None) -> None:
        self._base, self._headers = root(base_url), _key(api_key)
        self._client = client or httpx.AsyncClient(timeout=_TIMEOUT)

    async def add(self, texts: Iterable[str], document: str | None = None) -> Added:
        return _sum([_added(await self._ask(call), start) for start, call in _adding(texts, document)])

    async def replace(self, document: str, texts: Iterable[str]) -> Replaced:
        answer = await self._ask(_document("PUT", document, {"texts": _listed(texts)}))
        return Replaced(**vars(_added(answer)), removed=answer["removed"])

    async def forget(self, texts: Iterable[str], document: str | None = None) -> None:
        await self._ask(_forgetting(texts, document))

    async def forget_document(self, document: str) -> None:
        await self._ask(_document("DELETE", document))

    async def fuse(self, neighbours: Mapping[str, Iterable[str]] | None = None) -> Added:
        return _added(await self._ask(_fusing(neighbours)))

    async def stats(self) -> ChunkStats:
        return ChunkStats(**await self._ask(_STATS))

    async def models(self) -> list[dict[str, Any]]:
        return list((await self._ask(_MODELS))["data"])

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> AsyncChunkClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask(self, call: Call) -> dict[str, Any]:
        method, path, body = call
        try:
            return _answer(await self._client.request(method, self._base + path, content=body, headers=self._headers))
        except httpx.HTTPError as error:
            raise _unreachable(self._base, error) from error


def root(base_url: str) -> str:
    """With /v1, which OpenAI clients want at the end and people leave out."""
    return base_url.rstrip("/").removesuffix("/v1") + "/v1"


def _key(api_key: str | None) -> dict[str, str]:
    key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"Content-Type": "application/json", **key}


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()  # in ASCII: a text that is no Unicode is refused by the server, in words


def _listed(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise ConfigurationError("chunks are given as several texts, not as one: [text]")
    return list(texts)


def _document(method: str, document: str, body: dict[str, Any] | None = None) -> Call:
    if document in ("", ".", ".."):
        raise ConfigurationError(f"a document's id cannot be {document!r}: no path ends with it")
    return method, f"/documents/{quote(document, safe='')}", b"" if body is None else _json(body)


def _forgetting(texts: Iterable[str], document: str | None) -> Call:
    return "POST", "/chunks/forget", _json({"texts": _listed(texts), "document": document})


def _fusing(neighbours: Mapping[str, Iterable[str]] | None) -> Call:
    pairs = None if neighbours is None else [{"text": t, "neighbours": _listed(n)} for t, n in neighbours.items()]
    return "POST", "/chunks/fuse", _json({"chunks": pairs})


def _adding(texts: Iterable[str], document: str | None) -> Iterator[tuple[int, Call]]:
    """The requests, each with the place of its first text among all."""
    start, batch, size = 0, list[str](), 0
    for text in [*_listed(texts), None]:
        if batch and (text is None or size + len(text) > _BATCH):
            yield start, ("POST", "/chunks", _json({"texts": batch, "document": document}))
            start, batch, size = start + len(batch), [], 0
        if text is not None:
            batch.append(text)
            size += len(text)


def _added(answer: dict[str, Any], start: int = 0) -> Added:
    skipped = [Skipped(start + one["index"], one["reason"]) for one in answer["skipped"]]
    return Added(answer["encoded"], answer["kept"], skipped)


def _sum(parts: Iterable[Added]) -> Added:
    parts = list(parts)
    skipped = [one for part in parts for one in part.skipped]
    return Added(sum(part.encoded for part in parts), sum(part.kept for part in parts), skipped)


def _answer(response: httpx.Response) -> dict[str, Any]:
    try:
        body: Any = response.json()
    except json.JSONDecodeError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    said = body.get("error") if isinstance(body, dict) else None
    said = said.get("message") if isinstance(said, dict) else said
    raise ServerError(
        f"{response.request.method} {response.request.url.path}: {response.status_code}, {said or response.text[:200]}",
        response.status_code,
    )


def _unreachable(base: str, error: httpx.HTTPError) -> ServerError:
    return ServerError(f"{base} did not answer: {error or type(error).__name__}")
