"""`CacheClipVectorStore`: any vector store, and the KV of what is in it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.runnables import run_in_executor
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from cacheclip_rag.frameworks import Fuser, HeldIds, OnMiss, StoredChunk, StoreFollower, handle_of

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


class _Search(_Inner):
    """As `_Inner`, and what is found that has no KV will have."""

    def __get__(self, instance: CacheClipVectorStore | None, owner: type) -> Any:
        method = super().__get__(instance, owner)
        if instance is None:
            return method

        def search(query: Any, *args: Any, **kwargs: Any) -> Any:
            found = method(query, *args, **kwargs)
            instance._retrieved(query, found)
            return found

        async def asearch(query: Any, *args: Any, **kwargs: Any) -> Any:
            found = await method(query, *args, **kwargs)
            await run_in_executor(None, instance._retrieved, query, found)
            return found

        return functools.wraps(method)(asearch if inspect.iscoroutinefunction(method) else search)


class CacheClipVectorStore(VectorStore):
    """Wraps a vector store: chunks are encoded when they are added and their KV is dropped when they are deleted.

    Everything else is the wrapped store's. Encoding never raises, and comes after the store has the chunk: one without
    KV only costs time. KV belongs to a text, so it stays as long as any id has that text. Which id has which text is
    kept beside the KV: every id is a document of the engine's (``engine.forget_document(id)``).

    With ``fuse=10`` every chunk is fused with the ten others most like it as well, of all that the engine knows, by the
    store's own embeddings: for methods that take fused variants (``method="auto"``, ``"fusionrag"``), at twice the
    cost. Leave it out where documents must not colour one another's KV; collections that must not, of which only some
    are fused, are of different tenants (``ChatCacheClip(tenant=...)``).

    Around a store that is filled already, what is retrieved is encoded in the background, so that the next question is
    faster; `ensure_all` encodes all of it ahead.

    Example:
        ``store = CacheClipVectorStore(Chroma(embedding_function=embeddings), llm)``

    """

    def __init__(
        self,
        store: VectorStore,
        llm: ChatCacheClip | Engine,
        *,
        show_progress: bool = True,
        fuse: int = 0,
        on_miss: OnMiss = "background",
    ) -> None:
        """``show_progress``: a progress bar, once encoding takes over a second. ``on_miss``: retrieved chunks without
        KV are encoded in the background, at once (``"encode"``), or not (``"ignore"``). Raises TypeError for another
        ``llm``, ValueError for ``fuse`` with a store that has no embeddings, and what `Fuser` raises.

        The engine is opened when the first chunks come.
        """
        self.store = store
        self.show_progress, self.on_miss = show_progress, on_miss
        handle = handle_of(llm)
        fuser: Fuser | None = None
        if fuse:
            handle.check_fusing(fuse)
            if (embeddings := store.embeddings) is None:
                raise ValueError(f"fuse={fuse} needs a store with embeddings; {type(store).__name__} has none")
            fuser = Fuser(fuse, embeddings.embed_documents)
        self._follower = StoreFollower(handle, fuser=fuser)

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Embeddings, metadatas: Any = None, **kwargs: Any) -> NoReturn:
        """Always raises NotImplementedError: make a store, then wrap it."""
        raise NotImplementedError("make a store and wrap it: CacheClipVectorStore(store, llm).add_texts(...)")

    def ensure_all(self, documents: Iterable[Document] | None = None) -> int:
        """Encode what is in the store already, with progress; ``documents``: for a store that cannot list its own. How
        many chunks were encoded now.

        Begun again, it goes on where it was. Raises what opening an engine raises, and NotImplementedError for a store
        that cannot list its documents.
        """
        listed = _listed(self.store) if documents is None else [(d.id, d.page_content) for d in documents]
        return self._follower.there([StoredChunk(id_ or "", t, document=id_) for id_, t in listed], self.show_progress)

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
        found = self.store.similarity_search(query, k=k, **kwargs)
        self._retrieved(query, found)
        return found

    get_by_ids = _Inner()
    aget_by_ids = _Inner()
    search = _Search()
    asearch = _Search()
    asimilarity_search = _Search()
    similarity_search_with_score = _Search()
    asimilarity_search_with_score = _Search()
    similarity_search_with_relevance_scores = _Search()
    asimilarity_search_with_relevance_scores = _Search()
    similarity_search_by_vector = _Search()
    asimilarity_search_by_vector = _Search()
    max_marginal_relevance_search = _Search()
    amax_marginal_relevance_search = _Search()
    max_marginal_relevance_search_by_vector = _Search()
    amax_marginal_relevance_search_by_vector = _Search()
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

    def _retrieved(self, query: Any, found: Iterable[Document | tuple[Document, float]]) -> None:
        documents = [item[0] if isinstance(item, tuple) else item for item in found]
        question = query if isinstance(query, str) else None
        texts = [document.page_content for document in documents if isinstance(document, Document)]
        self._follower.retrieved(texts, question, self.on_miss)

    def _added(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        self._follower.added(_chunks(zip(ids, texts, strict=False)), self.show_progress)

    def _deleted(self, gone: dict[str, str], ids: Iterable[str] = ()) -> None:
        self._follower.deleted(_chunks(gone.items()), {*gone, *ids})


def _chunks(texts: Iterable[tuple[str, str]]) -> list[StoredChunk]:
    """By id: LangChain knows no documents beyond, so each entry is one."""
    return [StoredChunk(id_, text, document=id_) for id_, text in texts]


def _listed(store: VectorStore) -> list[tuple[str | None, str]]:
    """The ids and texts of a store of a kind that can tell them; LangChain has no method for it."""
    if isinstance(store, InMemoryVectorStore):
        return [(id_, entry["text"]) for id_, entry in store.store.items()]
    entries: Any = getattr(getattr(store, "docstore", None), "_dict", None)  # FAISS
    if isinstance(entries, Mapping):
        return [(id_, document.page_content) for id_, document in entries.items()]
    try:
        found: Any = store.get(include=["documents"])  # type: ignore[attr-defined]  # Chroma
        return list(zip(found["ids"], found["documents"], strict=True))
    except (AttributeError, TypeError, KeyError) as error:
        name = type(store).__name__
        raise NotImplementedError(f"{name} cannot list its documents; give them: ensure_all(documents)") from error


def _ids_of(documents: Sequence[Document], kwargs: dict[str, Any]) -> list[str | None]:
    return list(kwargs["ids"]) if kwargs.get("ids") else [document.id for document in documents]


def _gone(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    return {id_: text for id_, text in before.items() if id_ not in after}
