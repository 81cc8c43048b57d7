"""`CacheClipVectorStore`: any vector store, and the KV of what is in it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from cacheclip_rag.frameworks import StoredChunk, StoreFollower, handle_of

from .copies import restore

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

    from cacheclip_rag.engine import Engine

    from .base import CacheClipLLM

log = logging.getLogger("cacheclip_rag")


class CacheClipVectorStore(BasePydanticVectorStore):
    """Wraps a vector store: chunks are encoded when they are added and their KV is dropped when they are deleted.

    Everything else is the wrapped store's. Encoding never raises, and comes after the store has the chunk: one without
    KV only costs time. KV belongs to a text, so it stays as long as any node has that text; nodes that were added
    before this process started are seen when they are deleted, if the wrapped store keeps text and can be asked, or if
    their whole document is deleted.

    LlamaIndex changes a document by deleting all of it and adding the new version. So KV of deleted nodes is dropped
    with the next `add`, which may bring their text back, or ``grace`` seconds later, or when the process ends.

    Example:
        ``store = CacheClipVectorStore(ChromaVectorStore(chroma_collection=collection), llm)``

    """

    store: SerializeAsAny[BasePydanticVectorStore] = Field(description="The wrapped store.")
    show_progress: bool = Field(default=True, description="A progress bar, once encoding takes over a second.")
    grace: float = Field(default=300.0, ge=0.0, description="The longest that KV outlives its last node, in seconds.")

    _follower: StoreFollower = PrivateAttr()

    def __init__(self, store: BasePydanticVectorStore, llm: CacheClipLLM | Engine, **fields: Any) -> None:
        """The engine is opened when the first chunks come. Raises TypeError for another ``llm``."""
        handle = handle_of(llm)
        own = {"stores_text": store.stores_text, "is_embedding_query": store.is_embedding_query}
        super().__init__(store=store, **{**own, **fields})
        self._follower = StoreFollower(handle, grace=self.grace)

    @classmethod
    def class_name(cls) -> str:
        return "CacheClipVectorStore"

    def flush(self) -> None:
        """Drop the KV of deleted nodes now."""
        self._follower.flush()

    def ensure_all(self, nodes: Iterable[BaseNode] | None = None) -> int:
        """Encode what is in the store already, with progress; ``nodes``: for a store that cannot list its own (then,
        for instance, ``index.docstore.docs.values()``). How many chunks were encoded now.

        Begun again, it goes on where it was. Raises what opening an engine raises, and NotImplementedError for a store
        that cannot list its nodes.
        """
        try:
            listed = self.store.get_nodes(None, None) if nodes is None else list(nodes)
        except (NotImplementedError, ValueError) as error:
            name = type(self.store).__name__
            raise NotImplementedError(f"{name} cannot list its nodes; give them: ensure_all(nodes)") from error
        return self._follower.there(_chunks(listed), self.show_progress)

    # ---- what changes the store -------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        ids = self.store.add(nodes, **kwargs)
        self._added(nodes)
        return ids

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        gone = self._ask(None, _of(ref_doc_id))
        self.store.delete(ref_doc_id, **delete_kwargs)
        self._gone(gone, self._ids_of(ref_doc_id), ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        gone = self._ask(node_ids, filters)
        self.store.delete_nodes(node_ids, filters, **delete_kwargs)
        self._gone(gone, () if filters else node_ids)

    def clear(self) -> None:
        gone = self._ask(None, None)
        self.store.clear()
        self._gone(gone, self._follower.held.ids())

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        ids = await self.store.async_add(nodes, **kwargs)
        await asyncio.to_thread(self._added, nodes)
        return ids

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        gone = await self._aask(None, _of(ref_doc_id))
        await self.store.adelete(ref_doc_id, **delete_kwargs)
        await asyncio.to_thread(self._gone, gone, self._ids_of(ref_doc_id), ref_doc_id)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        gone = await self._aask(node_ids, filters)
        await self.store.adelete_nodes(node_ids, filters, **delete_kwargs)
        await asyncio.to_thread(self._gone, gone, () if filters else node_ids)

    async def aclear(self) -> None:
        gone = await self._aask(None, None)
        await self.store.aclear()
        await asyncio.to_thread(self._gone, gone, self._follower.held.ids())

    # ---- what does not ----------------------------------------------------------------------------------------------

    @property
    def client(self) -> Any:
        return self.store.client

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        return self.store.get_nodes(node_ids, filters, **kwargs)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **kwargs: Any
    ) -> list[BaseNode]:
        return await self.store.aget_nodes(node_ids, filters, **kwargs)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return self.store.query(query, **kwargs)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        return await self.store.aquery(query, **kwargs)

    def persist(self, persist_path: str, fs: AbstractFileSystem | None = None) -> None:
        self.store.persist(persist_path, fs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]  # pydantic defines it, out of sight of type checkers
        except AttributeError:
            if name.startswith("_") or "store" not in self.__dict__:
                raise
            return getattr(self.store, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _added(self, nodes: Sequence[BaseNode]) -> None:
        self._follower.added(_chunks(nodes), self.show_progress)

    def _gone(self, asked: Sequence[BaseNode], ids: Iterable[str] | None, document: str | None = None) -> None:
        """Nodes left the store: those it told of before, and those that are known here; all of a ``document``."""
        told = [chunk if chunk.document else replace(chunk, document=document) for chunk in _chunks(asked)]
        known = self._follower.held.get(ids or ())
        gone = {chunk.id: chunk for chunk in (*told, *known)}
        self._follower.deleted(list(gone.values()), [document] if document else ())

    def _ids_of(self, ref_doc_id: str) -> list[str]:
        return [chunk.id for chunk in self._follower.held.of(ref_doc_id)]

    def _ask(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> Sequence[BaseNode]:
        """The nodes that are about to be deleted, as far as the store can tell."""
        if node_ids == []:  # to some stores that means all
            return []
        try:
            return self.store.get_nodes(node_ids, filters)
        except Exception as error:
            return self._not_told(error)

    async def _aask(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> Sequence[BaseNode]:
        if node_ids == []:
            return []
        try:
            return await self.store.aget_nodes(node_ids, filters)
        except Exception as error:
            return self._not_told(error)

    def _not_told(self, error: Exception) -> Sequence[BaseNode]:
        log.debug("%s cannot be asked for its nodes: %s", type(self.store).__name__, error)
        return []


def _chunks(nodes: Iterable[BaseNode]) -> list[StoredChunk]:
    """What response synthesizers will put into the prompt."""
    return [StoredChunk(n.node_id, n.get_content(metadata_mode=MetadataMode.LLM), n.ref_doc_id) for n in nodes]


def _of(ref_doc_id: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key="ref_doc_id", value=ref_doc_id)])
