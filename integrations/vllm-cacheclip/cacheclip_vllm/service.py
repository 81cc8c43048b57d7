"""The chunks of a vLLM server over HTTP: encoded by requests to its own engine, kept and forgotten in the folder.

The API server's process encodes nothing and tells the engine nothing: what the worker stores appears in the folder, and
what is forgotten there is gone for the scheduler with the next request that it plans.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from cacheclip_rag.chunks import MIN_CHARS, canonical
from cacheclip_rag.errors import ConfigurationError, PromptError, ServerError, StoreError
from cacheclip_rag.methods import Method
from cacheclip_rag.server.service import Added, ChunkStats, Replaced, Skipped
from cacheclip_rag.store import Documents, Place

from .encoding import encode_request
from .libraries import Libraries

log = logging.getLogger("cacheclip_rag")

_AT_ONCE = 16
"""Chunks of all requests that the engine is given at the same time; it takes as many of them into a pass as fit."""
_NOT_STORED = "it could not be encoded or kept: the server's log says why (a full store, or a failure)"


class Chunks:
    """The `ChunkService` of a vLLM server. ``method``: the one whose encoding chunks are stored in."""

    def __init__(self, engine: Any, libraries: Libraries, method: Method) -> None:
        self._engine, self._libraries, self._method = engine, libraries, method
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def add(self, tenant: str, texts: Sequence[str], document: str | None) -> Added:
        if document is not None:  # before anything is stored: what cannot be noted is an error here
            await asyncio.to_thread(self._documents(tenant).add, document, texts)
        return await self._ensure(tenant, texts)

    async def replace(self, tenant: str, document: str, texts: Sequence[str]) -> Replaced:
        documents = self._documents(tenant)
        vanished = documents.of(document) - set(map(documents.text, texts))
        await asyncio.to_thread(documents.add, document, texts)
        added = await self._ensure(tenant, texts)
        await asyncio.to_thread(self._forget_digests, tenant, documents.only([document]) & vanished)
        documents.release(document, vanished)
        return Replaced(**vars(added), removed=len(vanished))

    async def forget(self, tenant: str, texts: Sequence[str], document: str | None = None) -> None:
        if not (gone := list(texts)):
            return
        documents = self._documents(tenant)
        if document is None:
            await asyncio.to_thread(self._place(tenant).forget_elsewhere, set(map(documents.text, gone)))
            documents.drop(gone)
        else:
            documents.discard(document, gone)
            unheld = frozenset(map(documents.text, documents.unheld(gone)))
            await asyncio.to_thread(self._forget_digests, tenant, unheld)

    async def forget_document(self, tenant: str, document: str) -> None:
        documents = self._documents(tenant)
        await asyncio.to_thread(self._forget_digests, tenant, documents.only([document]))
        documents.remove([document])

    async def stats(self, tenant: str) -> ChunkStats:
        library = self._libraries.of(tenant, self._method.encode)
        await asyncio.to_thread(library.store.refresh)
        found = library.store.stats()
        return ChunkStats(found.entries, found.fused, found.nbytes, found.hits, found.misses, found.evicted)

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _place(self, tenant: str) -> Place:
        self._libraries.of(tenant, self._method.encode)  # its namespace at the remote, too
        return self._libraries.place(tenant)

    def _documents(self, tenant: str) -> Documents:
        return self._place(tenant).documents

    def _forget_digests(self, tenant: str, wanted: frozenset[str]) -> None:
        if wanted:
            self._place(tenant).forget_everywhere(wanted)

    async def _ensure(self, tenant: str, texts: Sequence[str]) -> Added:
        """Encode those of the texts that are not stored. Raises `StoreError` if none of them could be."""
        library = self._libraries.of(tenant, self._method.encode)
        await asyncio.to_thread(library.store.refresh)
        places: dict[str, int] = {}
        for index, text in enumerate(texts):
            places.setdefault(canonical(text), index)
        reasons = {text: reason for text in places if (reason := self._refused(text)) is not None}
        missing = [text for text in places if text not in reasons and library.key(text) not in library.store]
        failures = await asyncio.gather(*(self._encode(tenant, text) for text in missing))
        await asyncio.to_thread(library.store.refresh)
        for text, failure in zip(missing, failures, strict=True):
            if library.key(text) not in library.store:
                reasons[text] = failure or _NOT_STORED
        encoded = sum(text not in reasons for text in missing)
        if missing and not encoded and all(text in reasons for text in places):
            raise StoreError(f"no chunk is stored: {reasons[missing[0]]}")
        skipped = sorted((places[text], reason) for text, reason in reasons.items())
        return Added(
            encoded, len(places) - len(reasons) - encoded, [Skipped(index, reason) for index, reason in skipped]
        )

    def _refused(self, text: str) -> str | None:
        """Why a (canonical) text is not encoded, before anything is tried."""
        model = self._libraries.model
        if len(text) < MIN_CHARS:
            return f"a chunk of {len(text)} characters is not kept: under {MIN_CHARS}, prefilling is as quick"
        try:
            ids, _ = encode_request(model, self._method, text)
        except PromptError as error:
            return str(error)
        longest = min(model.context_length, model.longest) - 1
        if len(ids) > longest:
            return (
                f"a chunk of {len(ids):,} tokens with its prefix exceeds {longest:,} (--max-model-len and "
                "--max-num-batched-tokens): split it"
            )
        return None

    async def _encode(self, tenant: str, text: str, context: Sequence[str] = ()) -> str | None:
        """Have the engine encode a text; why it did not, if it says so."""
        from vllm import SamplingParams

        ids, params = encode_request(self._libraries.model, self._method, text, tenant=tenant, context=context)
        sampling = SamplingParams(max_tokens=1, temperature=0, extra_args={"kv_transfer_params": params})
        async with self._at_once:
            try:
                async for _ in self._engine.generate({"prompt_token_ids": ids}, sampling, f"cacheclip-{uuid4().hex}"):
                    pass
            except (ValueError, ConfigurationError) as error:
                return str(error)
            except Exception as error:
                if getattr(self._engine, "errored", False):
                    raise ServerError("the engine has stopped", 503) from error
                log.exception("cacheclip: a chunk could not be encoded")
                return f"it could not be encoded: {type(error).__name__}"
        return None
