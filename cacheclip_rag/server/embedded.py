"""This library's engines behind the server: one a tenant, over one model's weights."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..chunks import canonical
from ..corpus.corpus import Ensured
from ..engine import Engine
from ..errors import ConfigurationError, ServerError, StoreError
from ..kv.encode import Harvested
from ..methods import METHODS, Method, resolve
from ..spec import parse
from .service import Added, ChunkStats, Replaced, Skipped

T = TypeVar("T")

_THREADS = 4
"""Ingestions at the same time. Answers have threads of their own, and forgetting does not wait for ingestion."""


class Engines:
    """The engine of each tenant, opened by ``open(tenant)`` at its first request. ``method``: what they were opened
    with. Thread-safe.
    """

    def __init__(self, open: Callable[[str], Engine], method: str | Method = "auto") -> None:
        self._open, self._method = open, resolve(method)
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self.closing = threading.Event()

    def of(self, tenant: str) -> Engine:
        with self._lock:
            if tenant not in self._engines:
                self._engines[tenant] = self._open(tenant)
            return self._engines[tenant]

    def check_method(self, method: str) -> None:
        """Raises `ConfigurationError` for a method that clients may not name: an unknown one, one that keeps what it
        was asked, and one with an encoding or a prefix cache of its own, of which each would take memory.
        """
        chosen = resolve(method)
        row = METHODS[parse(method)[0]]
        if isinstance(chosen.encode, Harvested):
            raise ConfigurationError(f'method "{chosen.name}" keeps the KV of prompts, which no request may ask for')
        if chosen.encode not in (row.encode, self._method.encode) or chosen.prefix_cache != row.prefix_cache:
            raise ConfigurationError(
                f'"{method}" needs KV of its own, which no request may ask for: serve with --method'
            )

    def close(self) -> None:
        """Stop what is being encoded, between two chunks, and background work. What is finished is kept."""
        self.closing.set()
        for engine in list(self._engines.values()):
            engine.close()


class Chunks:
    """The `ChunkService` of `Engines`. Work is done in threads, so that the event loop stays free."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._ingesting = ThreadPoolExecutor(_THREADS, thread_name_prefix="cacheclip-ingest")

    async def add(self, tenant: str, texts: Sequence[str], document: str | None) -> Added:
        def work(engine: Engine) -> Added:
            if document is not None:  # before anything is stored: what cannot be noted is an error here
                engine.documents.add(document, texts)
            return _added(texts, engine.ensure(texts, self._progress))

        return await self._done(tenant, work, self._ingesting)

    async def replace(self, tenant: str, document: str, texts: Sequence[str]) -> Replaced:
        def work(engine: Engine) -> Replaced:
            result = engine.replace_document(document, texts, self._progress)
            return Replaced(**vars(_added(texts, result)), removed=result.removed)

        return await self._done(tenant, work, self._ingesting)

    async def forget(self, tenant: str, texts: Sequence[str], document: str | None = None) -> None:
        def work(engine: Engine) -> None:
            if document is None:
                engine.forget(texts)
            else:
                engine.documents.discard(document, texts)
                engine.forget(engine.documents.unheld(texts))

        await self._done(tenant, work)

    async def forget_document(self, tenant: str, document: str) -> None:
        await self._done(tenant, lambda engine: engine.forget_document(document))

    async def fuse(self, tenant: str, neighbours: Mapping[str, Sequence[str]] | None) -> Added:
        def work(engine: Engine) -> Added:
            wanted = engine.contexts() if neighbours is None else neighbours
            return _added(list(wanted), engine.fuse(wanted, self._progress))

        return await self._done(tenant, work, self._ingesting)

    async def stats(self, tenant: str) -> ChunkStats:
        def work(engine: Engine) -> ChunkStats:
            found = engine.stats().store
            return ChunkStats(found.entries, found.fused, found.nbytes, found.hits, found.misses, found.evicted)

        return await self._done(tenant, work)

    async def _done(self, tenant: str, work: Callable[[Engine], T], threads: ThreadPoolExecutor | None = None) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(threads, lambda: work(self._engines.of(tenant)))

    def _progress(self, done: int) -> None:
        if self._engines.closing.is_set():
            raise ServerError("the server is stopping: repeat the request when it runs again", 503)


def _added(texts: Sequence[str], result: Ensured) -> Added:
    """Raises `StoreError` if the store has kept none of these chunks."""
    if result.not_kept and not result.keys:
        raise StoreError(f"no chunk is stored: {'; '.join(dict.fromkeys(result.reasons.values()))}")
    places = {text: index for index, text in reversed(list(enumerate(texts)))}
    skipped = sorted((places[text], reason) for text, reason in result.reasons.items())
    stored = len({canonical(text) for text in texts} - {canonical(text) for text in result.reasons})
    return Added(result.encoded, stored - result.encoded, [Skipped(index, reason) for index, reason in skipped])
