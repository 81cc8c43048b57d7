"""vLLM's own OpenAI server with the endpoints for chunks in it, and control of access in front of it.

Both are named on vLLM's command line: the endpoints by ``VLLM_PLUGINS=cacheclip,cacheclip_chunks``, the middleware by
``--middleware cacheclip_vllm.http.ServerAccess``. `cacheclip serve` sets both.
"""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from cacheclip_rag.errors import ServerError
from cacheclip_rag.methods import resolve
from cacheclip_rag.server.access import Access, App, read_keys
from cacheclip_rag.server.chunks import router
from cacheclip_rag.server.service import Added, ChunkStats, Replaced

from . import PROOF
from .libraries import Libraries
from .plan import options
from .served import ServedModel
from .service import Chunks
from .settings import settings

KEYS, KEYS_FILE = "CACHECLIP_API_KEYS", "CACHECLIP_API_KEYS_FILE"
METHOD, AUXILIARY = "CACHECLIP_METHOD", "CACHECLIP_AUXILIARY"
"""Environment variables: API keys (``key`` or ``key=tenant``, one a line), a file of them, the default method, the
auxiliary model if there is one.
"""


def _keys() -> dict[str, str]:
    """Tenants by API key. Raises `ConfigurationError`."""
    file = os.environ.get(KEYS_FILE)
    return read_keys(filter(None, os.environ.get(KEYS, "").splitlines()), Path(file) if file else None)


class ServerAccess(Access):
    """`Access` as a middleware of vLLM's, which makes it from the application alone: keys come from the environment."""

    def __init__(self, app: App) -> None:
        default, auxiliary = resolve(os.environ.get(METHOD, "auto")), bool(os.environ.get(AUXILIARY))
        super().__init__(
            app,
            keys=_keys(),
            check_method=lambda method: options({"method": method}, default, auxiliary),
            added={"proof": os.environ.get(PROOF, "")},
        )


class ChunkEndpoints:
    """The endpoint plugin: routes for chunks and documents, over the server's own engine."""

    name = "cacheclip_chunks"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._chunks = _Unbound()

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router(self._chunks))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        config = engine_client.vllm_config
        chosen = settings(config)
        libraries = Libraries(ServedModel(config), chosen, in_memory=False, remote=True)
        self._chunks.bound = Chunks(engine_client, libraries, chosen.default)
        if chosen.fuse_when_idle:
            self._fusing = asyncio.create_task(self._chunks.bound.fuse_when_idle(sorted({"", *_keys().values()})))


class _Unbound:
    """A `ChunkService` that has its engine later than its routes."""

    bound: Chunks | None = None

    def _ready(self) -> Chunks:
        if self.bound is None:
            raise ServerError("the engine is being started: try again", 503)
        return self.bound

    async def add(self, tenant: str, texts: Sequence[str], document: str | None) -> Added:
        return await self._ready().add(tenant, texts, document)

    async def replace(self, tenant: str, document: str, texts: Sequence[str]) -> Replaced:
        return await self._ready().replace(tenant, document, texts)

    async def forget(self, tenant: str, texts: Sequence[str], document: str | None = None) -> None:
        await self._ready().forget(tenant, texts, document)

    async def forget_document(self, tenant: str, document: str) -> None:
        await self._ready().forget_document(tenant, document)

    async def fuse(self, tenant: str, neighbours: Mapping[str, Sequence[str]] | None) -> Added:
        return await self._ready().fuse(tenant, neighbours)

    async def stats(self, tenant: str) -> ChunkStats:
        return await self._ready().stats(tenant)
