"""The endpoints for chunks and documents, over any `ChunkService`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any
from weakref import WeakValueDictionary

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from ..errors import CacheClipError
from .access import tenant_of
from .problems import problem, problem_of, status_of
from .service import ChunkService

log = logging.getLogger("cacheclip_rag")

Document = Annotated[str, Field(min_length=1, max_length=1024, description="A document's id, chosen by the client.")]


class Texts(BaseModel):
    """Chunks, as they will stand in prompts. Anything else in the body is an error: nobody names a tenant here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str]


class OfDocument(Texts):
    document: Document | None = None


class Fusion(BaseModel):
    """A chunk, and the chunks that it is likely to follow in a prompt, the nearest first."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: str
    neighbours: list[str]


class Fusions(BaseModel):
    """Chunks to be fused; without any, those that were used together."""

    model_config = ConfigDict(extra="forbid", strict=True)

    chunks: list[Fusion] | None = None


class Route(APIRoute):
    """Answers errors in the shape of OpenAI's API, in whatever application it is mounted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                where = ".".join(str(part) for part in first["loc"][1:])
                return JSONResponse(problem(400, f"{where}: {first['msg']}" if where else first["msg"], where), 400)
            except (CacheClipError, NotImplementedError) as error:
                if status_of(error) >= 500:
                    log.error("%s %s failed: %s", request.method, request.scope["route"].path, error)
                return JSONResponse(problem_of(error), status_of(error))

        return handled


def router(chunks: ChunkService) -> APIRouter:
    """``POST /v1/chunks``, ``PUT`` and ``DELETE /v1/documents/{id}``, ``POST /v1/chunks/forget``, ``POST
    /v1/chunks/fuse`` and ``GET /v1/chunks/stats``. Repeating a request does no harm, so a client may after any failure.
    """
    routes = APIRouter(prefix="/v1", route_class=Route, tags=["chunks"])
    documents = WeakValueDictionary[tuple[str, str], asyncio.Lock]()

    def one_at_a_time(tenant: str, document: str) -> asyncio.Lock:
        """Two requests for one document would leave chunks of both, or chunks that no document has."""
        return documents.setdefault((tenant, document), asyncio.Lock())

    @routes.post("/chunks")
    async def add(body: OfDocument, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request.scope)
        if body.document is None:
            return asdict(await chunks.add(tenant, body.texts, None))
        async with one_at_a_time(tenant, body.document):
            return asdict(await chunks.add(tenant, body.texts, body.document))

    @routes.put("/documents/{document:path}")
    async def replace(document: Document, body: Texts, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request.scope)
        async with one_at_a_time(tenant, document):
            return asdict(await chunks.replace(tenant, document, body.texts))

    @routes.delete("/documents/{document:path}")
    async def forget_document(document: Document, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request.scope)
        async with one_at_a_time(tenant, document):
            await chunks.forget_document(tenant, document)
        return {"id": document, "deleted": True}

    @routes.post("/chunks/forget")
    @routes.delete("/chunks")
    async def forget(body: OfDocument, request: Request) -> dict[str, Any]:
        tenant = tenant_of(request.scope)
        async with nullcontext() if body.document is None else one_at_a_time(tenant, body.document):
            await chunks.forget(tenant, body.texts, body.document)
        return {"deleted": True}

    @routes.post("/chunks/fuse")
    async def fuse(body: Fusions, request: Request) -> dict[str, Any]:
        wanted = None if body.chunks is None else {one.text: one.neighbours for one in body.chunks}
        return asdict(await chunks.fuse(tenant_of(request.scope), wanted))

    @routes.get("/chunks/stats")
    async def stats(request: Request) -> dict[str, Any]:
        return asdict(await chunks.stats(tenant_of(request.scope)))

    return routes
