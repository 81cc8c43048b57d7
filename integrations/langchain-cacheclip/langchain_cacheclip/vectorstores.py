"""`CacheClipVectorStore`: any vector store, and the KV of what is in it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import VectorStore

from cacheclip_rag.frameworks import Fuser, HeldIds, StoredChunk, StoreFollower, handle_of

if TYPE_CHECKING:
    from cacheclip_rag.engine import Engine

    from .chat_models import ChatCacheClip

log = logging.getLogger("cacheclip_rag")


class _Inner:
    """A method of the wrapped store under the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: CacheClipVectorStore | None, owner: type) -> Any:
        return getattr(VectorStore if instance is None else instance.store, self._name)


class CacheClipVectorStore(VectorStore):
    """Wraps a vector store: chunks are encoded when they are added and their KV is dropped when they are deleted.

    Everything else is the wrapped store's. Encoding never raises, and comes after the store has the chunk: one without
    KV only costs time. KV belongs to a text, so it stays as long as any id has that text. Which id has which text is
    kept beside the KV: every id is a document of the engine's (``engine.forget_document(id)``).

    With ``fuse=10`` every chunk is fused with the ten others most like it as well, of all that the engine knows, by the
    store's own embeddings: for methods that take fused variants (``method="auto"``, ``"fusionrag"``), at twice the
    cost. Leave it out where documents must not colour one another's KV; collections that must not, of which only some
    are fused, are of different tenants (``ChatCacheClip(tenant=...)``).

    Example:
        ``store = CacheClipVectorStore(Chroma(embedding_function=embeddings), llm)``

    """

    def __init__(
        self, store: VectorStore, llm: ChatCacheClip | Engine, *, show_progress: bool = True, fuse: int = 0
    ) -> None:
        """``show_progress``: a progress bar, once encoding takes over a second. Raises TypeError for another ``llm``,
        ValueError for ``fuse`` with a store that has no embeddings, and what `Fuser` raises.

        The engine is opened when the first chunks come.
        """
        self.store = store
        self.show_progress = show_progress
        fuser: Fuser | None = None
        if fuse:
            if (embeddings := store.embeddings) is None:
                raise ValueError(f"fuse={fuse} needs a store with embeddings; {type(store).__name__} has none")
            fuser = Fuser(fuse, embeddings.embed_documents)
        self._follower = StoreFollower(handle_of(llm), fuser=fuser)

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, metadatas: Any = None, **kwargs: Any) -> NoReturn:
        """Always raises NotImplementedError: make a store, then wrap it."""
        raise NotImplementedError("make a store and wrap it: CacheClipVectorStore(store, llm).add_texts(...)")

    # ---- what changes the store -------------------------------------------------------------------------------------

    def add_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> list[str]:
        texts = list(texts)
        self._note(self._lookup(kwargs.get("ids")))
        ids = self.store.add_texts(texts, metadatas, **kwargs)
        self._added(ids, texts)
        return ids

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        self._note(self._lookup(_ids_of(documents, kwargs)))
        ids = self.store.add_documents(documents, **kwargs)
        self._added(ids, [document.page_content for document in documents])
        return ids

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """The wrapped store's deletion; of what it deleted by other means than ids, what this object added is known."""
        ids = None if ids is None else list(ids)
        before = self._note(self._lookup(self._held.ids() if ids is None else ids))
        result = self.store.delete(ids, **kwargs)
        self._deleted(before if ids is not None else _gone(before, self._lookup(list(before))), ids or ())
        return result

    async def aadd_texts(
        self, texts: Iterable[str], metadatas: list[dict[str, Any]] | None = None, **kwargs: Any
    ) -> list[str]:
        texts = list(texts)
        self._note(await self._alookup(kwargs.get("ids")))
        ids = await self.store.aadd_texts(texts, metadatas, **kwargs)
        await run_in_executor(None, self._added, ids, texts)
        return ids

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:
        self._note(await self._alookup(_ids_of(documents, kwargs)))
        ids = await self.store.aadd_documents(documents, **kwargs)
        await run_in_executor(None, self._added, ids, [document.page_content for document in documents])
        return ids

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        ids = None if ids is None else list(ids)
        before = self._note(await self._alookup(self._held.ids() if ids is None else ids))
        result = await self.store.adelete(ids, **kwargs)
        gone = before if ids is not None else _gone(before, await self._alookup(list(before)))
        await run_in_executor(None, self._deleted, gone, ids or ())
        return result

    # Not of LangChain's interface, but Chroma's and others': a store without them says so.

    def update_documents(self, ids: list[str], documents: list[Document]) -> None:
        self._note(self._lookup(ids))
        self.store.update_documents(ids, documents)  # type: ignore[attr-defined]
        self._added(ids, [document.page_content for document in documents])

    def update_document(self, document_id: str, document: Document) -> None:
        self.update_documents([document_id], [document])

    def delete_collection(self) -> None:
        """KV goes of what this object has seen in the collection."""
        self.store.delete_collection()  # type: ignore[attr-defined]
        self._deleted(self._known(self._held.ids()))

    def reset_collection(self) -> None:
        """KV goes of what this object has seen in the collection."""
        self.store.reset_collection()  # type: ignore[attr-defined]
        self._deleted(self._known(self._held.ids()))

    # ---- what does not ----------------------------------------------------------------------------------------------

    @property
    def embeddings(self) -> Embeddings | None:
        return self.store.embeddings

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return self.store.similarity_search(query, k=k, **kwargs)

    get_by_ids = _Inner()
    aget_by_ids = _Inner()
    search = _Inner()
    asearch = _Inner()
    asimilarity_search = _Inner()
    similarity_search_with_score = _Inner()
    asimilarity_search_with_score = _Inner()
    similarity_search_with_relevance_scores = _Inner()
    asimilarity_search_with_relevance_scores = _Inner()
    similarity_search_by_vector = _Inner()
    asimilarity_search_by_vector = _Inner()
    max_marginal_relevance_search = _Inner()
    amax_marginal_relevance_search = _Inner()
    max_marginal_relevance_search_by_vector = _Inner()
    amax_marginal_relevance_search_by_vector = _Inner()
    _select_relevance_score_fn = _Inner()
    _similarity_search_with_relevance_scores = _Inner()
    _asimilarity_search_with_relevance_scores = _Inner()
    _get_retriever_tags = _Inner()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "store":  # not there yet, as while this object is being copied
            raise AttributeError(name)
        return getattr(self.store, name)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _lookup(self, ids: Iterable[str | None] | None) -> dict[str, str]:
        """The texts that the store has under these ids, as far as it can tell."""
        wanted = [id_ for id_ in ids or () if id_ is not None]
        return self._read(wanted, lambda: self.store.get_by_ids(wanted))

    async def _alookup(self, ids: Iterable[str | None] | None) -> dict[str, str]:
        wanted = [id_ for id_ in ids or () if id_ is not None]
        found: list[Document] = []
        failure: Exception | None = None
        if wanted:
            try:
                found = await self.store.aget_by_ids(wanted)
            except Exception as error:
                failure = error

        def read() -> list[Document]:
            if failure is not None:
                raise failure
            return found

        return self._read(wanted, read)

    def _read(self, wanted: list[str], read: Callable[[], list[Document]]) -> dict[str, str]:
        if not wanted:
            return {}
        try:
            return {document.id: document.page_content for document in read() if document.id is not None}
        except Exception as error:  # not every store can be asked; then only what was added here is known
            log.debug("%s cannot be asked for ids: %s", type(self.store).__name__, error)
            return self._known(wanted)

    @property
    def _held(self) -> HeldIds:
        return self._follower.held

    def _known(self, ids: Iterable[str]) -> dict[str, str]:
        return {chunk.id: chunk.text for chunk in self._held.get(ids)}

    def _note(self, found: dict[str, str]) -> dict[str, str]:
        """Remember what the store has before it changes, whoever put it there."""
        self._held.hold(_chunks(found.items()))
        return found

    def _added(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._follower.added(_chunks(zip(ids, texts, strict=False)), self.show_progress)

    def _deleted(self, gone: dict[str, str], ids: Iterable[str] = ()) -> None:
        self._follower.deleted(_chunks(gone.items()), {*gone, *ids})


def _chunks(texts: Iterable[tuple[str, str]]) -> list[StoredChunk]:
    """By id: LangChain knows no documents beyond, so each entry is one."""
    return [StoredChunk(id_, text, document=id_) for id_, text in texts]


def _ids_of(documents: Sequence[Document], kwargs: dict[str, Any]) -> list[str | None]:
    return list(kwargs["ids"]) if kwargs.get("ids") else [document.id for document in documents]


def _gone(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {id_: text for id_, text in before.items() if id_ not in after}
