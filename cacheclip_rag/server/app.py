"""The whole server of the embedded engine: OpenAI's endpoints, those for chunks, and who may use them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from . import chunks, openai
from .access import LIMIT, Access
from .embedded import Chunks, Engines
from .problems import problem, problem_of

log = logging.getLogger("cacheclip_rag")

_PATIENCE = 10
"""Seconds that answers have to end once the server is to stop."""


def app(engines: Engines, model: str, keys: Mapping[str, str] | None = None, limit: int = LIMIT) -> Access:
    """An ASGI application. ``model``: what the model is called; ``keys`` and ``limit`` are those of `Access`."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engines.close)

    inner = FastAPI(title="cacheclip", lifespan=lifespan, docs_url=None, redoc_url=None)  # these load from elsewhere
    inner.include_router(openai.router(engines, model))
    inner.include_router(chunks.router(Chunks(engines)))

    @inner.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok"}

    @inner.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(problem(error.status_code, str(error.detail)), error.status_code, error.headers)

    @inner.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(problem_of(error), 500)

    return Access(inner, keys=keys, check_method=engines.check_method, limit=limit)


def run(engines: Engines, model: str, keys: Mapping[str, str] | None, host: str, port: int) -> None:
    """Serve until it is told to stop by SIGINT or SIGTERM. Paths are not logged: document ids stand in them."""

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            engines.closing.set()  # ingestion ends now, streams may end by themselves
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app(engines, model, keys), host=host, port=port, access_log=False, timeout_graceful_shutdown=_PATIENCE
    )
    Server(config).run()
