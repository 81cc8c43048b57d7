"""The chunks of a vLLM server over HTTP: encoded by requests to its own engine, kept and forgotten in the folder.

The API server's process encodes nothing and tells the engine nothing: what the worker stores appears in the folder, and
what is forgotten there is gone for the scheduler with the next request that it plans.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import uuid4

from cacheclip_rag.chunks import MIN_CHARS, canonical
from cacheclip_rag.errors import ConfigurationError, PromptError, ServerError, StoreError
from cacheclip_rag.kv.library import Library
from cacheclip_rag.methods import Method
from cacheclip_rag.server.service import Added, ChunkStats, Replaced, Skipped
from cacheclip_rag.store import Documents, Place

from . import seams
from .encoding import encode_request
from .libraries import Libraries

log = logging.getLogger("cacheclip_rag")

_AT_ONCE = 16
"""Chunks of all requests that the engine is given at the same time; it takes as many of them into a pass as fit."""
_NEIGHBOURS = 10
"""The longest context that a chunk is fused with by use, in chunks."""
_PAUSE = 10.0
"""Seconds between two looks at what was used together."""
_VARIANTS = 3
"""Fused variants that are kept of a chunk."""
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

    async def fuse(self, tenant: str, neighbours: Mapping[str, Sequence[str]] | None = None) -> Added:
        """Store a variant of each of these chunks, computed behind its ``neighbours``, as `Engine.fuse` does; None: of
        the chunks that occurred in two prompts or more, behind those that are likely to precede them.
        """
        wanted = await asyncio.to_thread(self._used, tenant) if neighbours is None else dict(neighbours)
        library = self._libraries.of(tenant, self._method.encode)
        variants = self._libraries.variants(tenant, self._method.encode)
        await asyncio.to_thread(library.store.refresh)
        reasons: dict[str, str] = {}
        todo: list[tuple[str, list[str]]] = []
        for text, others in wanted.items():
            context = self._context(text, others, library)
            if library.key(text) not in library.store:
                reasons[text] = "the chunk is not stored: add it first"
            elif not context:
                reasons[text] = "none of its neighbours is stored, or fits before it: add them first"
            elif variants.key(text, tuple(context)) not in library.store:
                todo.append((canonical(text), context))
        failures = await asyncio.gather(*(self._encode(tenant, text, context) for text, context in todo))
        await asyncio.to_thread(self._keep_newest, tenant, [text for text, _ in todo])
        reasons |= {text: failure for (text, _), failure in zip(todo, failures, strict=True) if failure}
        places = {text: number for number, text in enumerate(wanted)}
        skipped = [Skipped(places[text], reason) for text, reason in reasons.items() if text in places]
        return Added(len(todo) - sum(map(bool, failures)), len(wanted) - len(todo) - len(reasons), skipped)

    async def fuse_when_idle(self, tenants: Sequence[str]) -> None:
        """For ever: while the engine has no request, fuse what was used together, one chunk at a time."""
        while True:
            await asyncio.sleep(_PAUSE)
            for tenant in tenants:
                try:
                    for text, others in (await asyncio.to_thread(self._used, tenant)).items():
                        if not seams.idle(self._engine):
                            break
                        await self.fuse(tenant, {text: others})
                except Exception:  # a store that is away; the next round tries again
                    log.exception("cacheclip: chunks could not be fused in idle time")

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _place(self, tenant: str) -> Place:
        self._libraries.of(tenant, self._method.encode)  # its namespace at the remote, too
        return self._libraries.place(tenant)

    def _documents(self, tenant: str) -> Documents:
        return self._place(tenant).documents

    def _forget_digests(self, tenant: str, wanted: frozenset[str]) -> None:
        if wanted:
            self._place(tenant).forget_everywhere(wanted)

    def _used(self, tenant: str) -> dict[str, list[str]]:
        """The chunks of two prompts or more, each with those that are expected before it, the likeliest first."""
        library = self._libraries.of(tenant, self._method.encode)
        usage = self._libraries.usage(tenant, self._method.encode)
        texts = {entry.key: entry.text for entry in library.store.entries() if not entry.context}
        expected = usage.expected_contexts(usage.hot(2), _NEIGHBOURS)
        return {
            texts[name]: context
            for name, others in expected.items()
            if name in texts and (context := [texts[other] for other in others if other in texts])
        }

    def _context(self, text: str, others: Sequence[str], library: Library) -> list[str]:
        """Those of the ``others`` that are stored, each once, as many as fit before the chunk."""
        model = self._libraries.model
        room = model.context_length - len(encode_request(model, self._method, text)[0])
        context: list[str] = []
        for other in dict.fromkeys(map(canonical, others)):
            if other != canonical(text) and library.key(other) in library.store:
                room -= len(model.tokenise(other, plain=True))
                if room < 0:
                    break
                context.append(other)
        return context

    def _keep_newest(self, tenant: str, texts: Sequence[str]) -> None:
        """Delete all but the newest `_VARIANTS` fused variants of these chunks."""
        library = self._libraries.of(tenant, self._method.encode)
        variants = self._libraries.variants(tenant, self._method.encode)
        library.store.refresh()
        variants.refresh()
        old = [variants.key(text, context) for text in texts for context in variants.held(text)[:-_VARIANTS]]
        library.store.delete([key for key in old if key is not None])

    async def _ensure(self, tenant: str, texts: Sequence[str]) -> Added:
        """Encode those of the texts that are not stored. Raises `StoreError` if none of them could be."""
        library = self._libraries.of(tenant, self._method.encode)
        await asyncio.to_thread(library.store.refresh)
        places: dict[str, int] = {}
        for index, text in enumerate(texts):
            places.setdefault(canonical(text), index)
        reasons = {text: reason for text in places if (reason := self._refused(text)) is not None}
        missing = [text for text in places if text not in reasons and library.key(text) not in library.store]
        if self._libraries.has_remote:  # another server may have encoded it
            fetched = await asyncio.gather(*(asyncio.to_thread(library.get, library.key(text)) for text in missing))
            missing = [text for text, chunk in zip(missing, fetched, strict=True) if chunk is None]
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
