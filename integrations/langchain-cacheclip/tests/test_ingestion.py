"""The vector store: every chunk encoded once, found again after a restart, dropped when nothing has it any more."""

from __future__ import annotations

import copy
import pickle
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_cacheclip import CacheClipCompressor, CacheClipVectorStore, ChatCacheClip
from langchain_chroma import Chroma
from langchain_core.documents import Document
from langchain_core.indexing import InMemoryRecordManager, aindex, index
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore

from cacheclip_rag import Backbone, Engine


def text(number: int) -> str:
    return f"Chunk number {number}. " + f"It says that the answer to question {number} is {number * 7}. " * 2


def document(number: int, source: str | None = None, **metadata: Any) -> Document:
    return Document(text(number), metadata={"source": source or f"s{number}", **metadata})


@pytest.fixture(params=["memory", "chroma"])
def inner(request: pytest.FixtureRequest, embedding: Any) -> Iterator[VectorStore]:
    if request.param == "memory":
        yield InMemoryVectorStore(embedding)
    else:
        chroma = Chroma(collection_name=f"c{uuid.uuid4().hex}", embedding_function=embedding)
        yield chroma
        chroma.delete_collection()


@pytest.fixture
def store(inner: VectorStore, engine: Engine) -> CacheClipVectorStore:
    return CacheClipVectorStore(inner, engine, show_progress=False)


@pytest.fixture
def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is encoded from now on."""
    seen: list[str] = []
    encode = engine.library.encode_each
    monkeypatch.setattr(engine.library, "encode_each", lambda texts: seen.extend(texts) or encode(texts))
    return seen


def known(engine: Engine, *numbers: int) -> list[int]:
    return [number for number in numbers if engine.knows(text(number))]


@pytest.mark.behaviour("LangChain", "ingestion: `index()` and `aindex()`, incremental and full cleanup")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_index(store: Any, engine: Engine, encoded: list[str], asynchronous: bool) -> None:
    """Added, skipped, changed, moved to another source, cleaned up: the KV follows."""
    records = InMemoryRecordManager("ns")
    records.create_schema()

    async def run(documents: list[Document], cleanup: Any = "incremental") -> Any:
        options: Any = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}
        if asynchronous:
            return await aindex(documents, records, store, **options)
        return index(documents, records, store, **options)

    assert (await run([document(0), document(1), document(2)]))["num_added"] == 3
    assert known(engine, 0, 1, 2) == [0, 1, 2] and len(encoded) == 3
    assert (await run([document(0), document(1), document(2)]))["num_skipped"] == 3 and len(encoded) == 3
    changed = await run([document(7, source="s1")])
    assert changed["num_added"] == changed["num_deleted"] == 1
    assert known(engine, 0, 1, 2, 7) == [0, 2, 7] and len(encoded) == 4
    metadata_only = await run([document(0, revised=True)])
    assert metadata_only["num_added"] == metadata_only["num_deleted"] == 1
    assert known(engine, 0) == [0] and len(encoded) == 4  # indexed anew, not encoded anew
    await run([document(0, source="another")])
    assert len(encoded) == 4
    await run([document(5, source="another")])
    assert known(engine, 0, 5) == [0, 5]  # the first source still has it
    assert (await run([], cleanup="full"))["num_deleted"] == 4
    assert known(engine, *range(8)) == []


@pytest.mark.behaviour("LangChain", "ingestion: ids written over")
def test_ids_written_over(store: Any, engine: Engine, encoded: list[str]) -> None:
    store.add_documents([document(1), document(2)], ids=["a", "b"])
    store.add_documents([document(1)], ids=["a"])
    assert len(encoded) == 2
    store.add_documents([document(3)], ids=["a"])
    assert known(engine, 1, 2, 3) == [2, 3]
    store.add_texts([text(4)], ids=["b"])
    assert known(engine, 2, 3, 4) == [3, 4]
    store.add_documents([Document(text(5), id="b")])
    assert known(engine, 3, 4, 5) == [3, 5]


async def test_ids_written_over_asynchronously(store: Any, engine: Engine) -> None:
    await store.aadd_documents([document(1), document(2)], ids=["a", "b"])
    await store.aadd_documents([document(3)], ids=["a"])
    await store.aadd_texts([text(4)], ids=["b"])
    assert known(engine, 1, 2, 3, 4) == [3, 4]
    await store.adelete(["a"])
    assert known(engine, 3, 4) == [4]


@pytest.mark.behaviour("LangChain", "ingestion: what the vector store adds and deletes, the KV follows")
def test_a_shared_text_stays_until_its_last_id_goes(store: Any, engine: Engine) -> None:
    store.add_texts([text(1), f"\n{text(1)} "], ids=["a", "b"])
    store.delete(["a"])
    assert known(engine, 1) == [1]
    store.delete(["b"])
    assert known(engine, 1) == []


def test_what_was_there_before_is_dropped_when_it_is_deleted(inner: VectorStore, engine: Engine) -> None:
    """As after a restart: the store persists, this object's memory does not."""
    CacheClipVectorStore(inner, engine).add_documents([document(1), document(2)], ids=["a", "b"])
    later = CacheClipVectorStore(inner, engine)
    later.delete(["a"])
    assert known(engine, 1, 2) == [2]
    later.add_documents([document(3)], ids=["b"])
    assert known(engine, 2, 3) == [3]


def test_deleting_what_is_not_there(store: Any, engine: Engine) -> None:
    store.add_documents([document(1)], ids=["a"])
    store.delete(["nobody"])
    assert known(engine, 1) == [1]


def test_deleting_by_other_means(engine: Engine, embedding: Any) -> None:
    chroma = Chroma(collection_name=f"c{uuid.uuid4().hex}", embedding_function=embedding)
    store = CacheClipVectorStore(chroma, engine)
    try:
        store.add_documents([document(1), document(2)], ids=["a", "b"])
        store.delete(where={"source": "s1"})
        assert known(engine, 1, 2) == [2]
    finally:
        store.delete_collection()


@pytest.mark.behaviour("LangChain", "ingestion: updates and whole collections, where the store has them")
def test_updates_and_whole_collections(engine: Engine, encoded: list[str], embedding: Any) -> None:
    chroma = Chroma(collection_name=f"c{uuid.uuid4().hex}", embedding_function=embedding)
    store = CacheClipVectorStore(chroma, engine)
    store.add_documents([document(1), document(2), document(3)], ids=["a", "b", "c"])
    store.update_document("a", document(4))
    assert known(engine, 1, 2, 3, 4) == [2, 3, 4] and len(encoded) == 4
    store.update_documents(["b", "c"], [document(2, revised=True), document(5)])
    assert known(engine, 2, 3, 4, 5) == [2, 4, 5] and len(encoded) == 5
    store.reset_collection()
    assert known(engine, 2, 4, 5) == [] and not store.get()["ids"]
    store.add_documents([document(6)])
    store.delete_collection()
    assert known(engine, 6) == []
    with pytest.raises(AttributeError, match="update_documents"):
        CacheClipVectorStore(InMemoryVectorStore(embedding), engine).update_documents(["a"], [document(1)])


def test_a_store_that_cannot_be_asked_for_ids(engine: Engine, embedding: Any) -> None:
    class Mute(InMemoryVectorStore):
        def get_by_ids(self, ids: Any, /) -> Any:
            raise NotImplementedError

        async def aget_by_ids(self, ids: Any, /) -> Any:
            raise NotImplementedError

    store = CacheClipVectorStore(Mute(embedding), engine)
    store.add_documents([document(1), document(2)], ids=["a", "b"])
    store.add_documents([document(3)], ids=["a"])
    store.delete(["b"])
    assert known(engine, 1, 2, 3) == [3]


@pytest.mark.behaviour("LangChain", "ingestion: a failure in encoding loses no vectors")
@pytest.mark.parametrize("broken", ["ensure", "forget"])
async def test_a_failure_in_encoding_does_not_touch_the_store(
    broken: str, store: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    store.add_documents([document(1)], ids=["a"])
    monkeypatch.setattr(engine, broken, fail)
    assert store.add_documents([document(2)], ids=["a"]) == ["a"]
    assert await store.aadd_documents([document(3)], ids=["b"]) == ["b"]
    store.delete(["a"])
    assert [found.page_content for found in store.get_by_ids(["a", "b"])] == [text(3)]


def test_a_model_that_cannot_be_opened_does_not_stop_ingestion(embedding: Any, tmp_path: Path) -> None:
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), ChatCacheClip(str(tmp_path)))
    assert store.add_documents([document(1)], ids=["a"]) == ["a"]
    store.delete(["a"])
    assert store.get_by_ids(["a"]) == []


@pytest.mark.behaviour("LangChain", "ingestion: a restarted application finds all KV")
def test_a_restarted_application_finds_all_kv(
    tiny_backbone: Backbone, tmp_path: Path, embedding: Any, recorder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chroma() -> Chroma:
        return Chroma("docs", embedding, persist_directory=str(tmp_path / "chroma"))

    with Engine(tiny_backbone, method="query_guided", store=tmp_path / "kv") as engine:
        CacheClipVectorStore(chroma(), engine).add_documents([document(1), document(2)], ids=["a", "b"])
    with Engine(tiny_backbone, method="query_guided", store=tmp_path / "kv") as engine:
        monkeypatch.setattr(engine.library, "encode_each", lambda texts: pytest.fail("encoded again"))
        store, calls = CacheClipVectorStore(chroma(), engine), recorder(engine)
        (found,) = store.similarity_search(text(2), k=1)
        ChatCacheClip.from_engine(engine, max_tokens=2).invoke(f"{found.page_content}\n\nWhat does it say?")
        assert calls.keys() == [engine.library.key(text(2))]


@pytest.mark.behaviour("LangChain", "ingestion: KV that was evicted is made again")
def test_kv_that_was_evicted_is_made_again(engine: Engine, embedding: Any) -> None:
    """`index` skips what it has a record of, so only retrieval notices."""
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine)
    records = InMemoryRecordManager("ns")
    records.create_schema()
    for _ in range(2):
        index([document(1)], records, store, cleanup=None, key_encoder="sha256")
        engine.forget([text(1)])
    assert known(engine, 1) == []
    found = store.similarity_search(text(1), k=1)
    CacheClipCompressor(engine, on_miss="encode").compress_documents(found, "What?")
    assert known(engine, 1) == [1]


def test_everything_else_is_the_wrapped_stores(
    inner: VectorStore, store: Any, embedding: Any, documents_of: Any
) -> None:
    store.add_documents(documents_of())
    question, vector = "the last train", embedding.embed_query("the last train")
    asks: list[Callable[[Any], Any]] = [
        lambda s: s.similarity_search(question, k=2),
        lambda s: s.similarity_search_with_score(question, k=2),
        lambda s: s.similarity_search_by_vector(vector, k=2),
        lambda s: s.max_marginal_relevance_search(question, k=2, fetch_k=4),
        lambda s: s.search(question, "similarity", k=1),
        lambda s: s.as_retriever(search_type="mmr", search_kwargs={"k": 2}).invoke(question),
        lambda s: s.get_by_ids(["p1"]),
        lambda s: s.embeddings,
    ]
    for ask in asks:
        assert ask(store) == ask(inner)
    if isinstance(inner, Chroma):
        assert store.get(ids=["p0"])["documents"]
        score = store.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": -9.0})
        assert score.invoke(question)
    with pytest.raises(AttributeError):
        _ = store.no_such_thing


def test_it_wraps_and_is_not_made() -> None:
    with pytest.raises(NotImplementedError, match="wrap"):
        CacheClipVectorStore.from_texts(["a"], None)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="wrap"):
        CacheClipVectorStore.from_documents([document(1)], None)  # type: ignore[arg-type]


def test_what_an_id_had_is_found_after_a_restart_though_the_store_cannot_be_asked(
    tiny_backbone: Backbone, tmp_path: Path, embedding: Any
) -> None:
    class Mute(InMemoryVectorStore):
        def get_by_ids(self, ids: Any, /) -> Any:
            raise NotImplementedError

    inner = Mute(embedding)
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        CacheClipVectorStore(inner, engine).add_texts([text(1), text(2), text(2)], ids=["a", "b", "c"])
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        CacheClipVectorStore(inner, engine).delete(["a", "b"])
        assert known(engine, 1, 2) == [2]  # another id has it still
        CacheClipVectorStore(inner, engine).delete(["c"])
        assert known(engine, 2) == []


@pytest.mark.behaviour("LangChain", "ingestion: chunks fused with those they resemble (`fuse=10`)")
def test_chunks_are_fused_with_the_most_similar(tiny_backbone: Backbone, embedding: Any) -> None:
    engine = Engine(tiny_backbone, method="auto")
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine, fuse=2, show_progress=False)
    ids = store.add_texts([text(1), text(2)])
    store.add_texts([text(3)])
    assert {frozenset(context) for context in engine.fused(text(3))} == {frozenset({text(1).strip(), text(2).strip()})}
    store.delete(ids[:1])
    assert not any(text(1).strip() in context for number in (2, 3) for context in engine.fused(text(number)))

    def contexts(*numbers: int) -> list[int]:
        return [len(engine.fused(text(number))) for number in numbers]

    store.add_texts([text(4)], ids=ids[1:])  # what was fused with the old text goes, and is made anew with the new
    assert contexts(3, 4) == [1, 1] and not any(text(2).strip() in context for context in engine.fused(text(3)))

    made = engine.fuse

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    engine.fuse = stopped
    with pytest.raises(KeyboardInterrupt):
        store.add_texts([text(5)])
    engine.fuse = made
    store.add_texts([text(4)], ids=ids[1:])  # the same again: what was interrupted is done now
    assert contexts(5) == [1]

    class Bare(InMemoryVectorStore):
        @property
        def embeddings(self) -> None:
            return None

    with pytest.raises(ValueError, match="needs a store with embeddings"):
        CacheClipVectorStore(Bare(embedding), engine, fuse=2)


def test_what_is_asked_about_together_is_fused_while_nothing_is_asked(tiny_folder: Path, embedding: Any) -> None:
    for allowed in (False, True):
        llm = ChatCacheClip(str(tiny_folder), fuse_when_idle=allowed, max_tokens=1, tenant="idle")
        try:
            CacheClipVectorStore(InMemoryVectorStore(embedding), llm, show_progress=False).add_texts([text(1), text(2)])
            for _ in range(2):
                llm.invoke(f"{text(1)}\n\n{text(2)}\n\nWhich?")
            llm.engine.flush()
            assert llm.engine.fused(text(2)) == ([(text(1).strip(),)] if allowed else [])
        finally:
            llm.close()


@pytest.mark.behaviour("LangChain", "ingestion: a store that was filled before it was wrapped")
async def test_a_store_that_was_filled_before(inner: VectorStore, engine: Engine) -> None:
    inner.add_documents([document(1), document(2), document(3)], ids=["a", "b", "c"])
    store = CacheClipVectorStore(inner, engine, show_progress=False)
    llm = ChatCacheClip.from_engine(engine, max_tokens=2)
    llm.invoke(f"Context information is below, as it was found.\n{text(1)}\n\nWhat does it say?")
    assert "nothing reused: no chunk in this prompt has stored KV" in str(llm.last_report())
    assert [found.id for found in store.as_retriever(search_kwargs={"k": 1}).invoke(text(1))] == ["a"]
    engine.flush()
    assert known(engine, 1, 2, 3) == [1]
    await store.asimilarity_search_with_score(text(2), k=1)
    engine.flush()
    assert known(engine, 1, 2, 3) == [1, 2]
    assert store.ensure_all() == 1 and known(engine, 3) == [3] and store.ensure_all() == 0
    store.delete(["c"])
    assert known(engine, 1, 2, 3) == [1, 2]


class Unlisted(VectorStore):
    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        return []

    @classmethod
    def from_texts(cls, texts: list[str], embedding: Any, metadatas: Any = None, **kwargs: Any) -> Unlisted:
        return cls()


def test_a_store_that_cannot_be_listed(engine: Engine) -> None:
    hidden = CacheClipVectorStore(Unlisted(), engine, show_progress=False)
    with pytest.raises(NotImplementedError, match="Unlisted cannot list"):
        hidden.ensure_all()
    assert hidden.ensure_all([document(1)]) == 1 and known(engine, 1) == [1]


def test_a_search_does_not_open_a_model(inner: VectorStore, tiny_folder: Path) -> None:
    inner.add_documents([document(1)], ids=["a"])
    llm = ChatCacheClip(str(tiny_folder), max_tokens=2, tenant="search")
    store = CacheClipVectorStore(inner, llm, show_progress=False)
    try:
        store.similarity_search(text(1), k=1)
        assert llm.handle.peek() is None
        llm.invoke("Hello.")
        store.similarity_search_by_vector([0.0] * 255 + [1.0], k=1)
        llm.engine.flush()
        assert known(llm.engine, 1) == [1]
    finally:
        llm.close()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_duplicates_of_a_store(engine: Engine, embedding: Any, duplicate: Any) -> None:
    store = CacheClipVectorStore(InMemoryVectorStore(embedding), engine, show_progress=False, fuse=1)
    store.add_documents([document(1), document(2)], ids=["a", "b"])
    twin = duplicate(store)
    assert twin.store is not store.store and twin.similarity_search(text(1), k=1)[0].id == "a"
    twin.delete(["a"])
    twin.add_documents([document(3)], ids=["c"])
    assert known(engine, 1, 2, 3) == [2, 3] and store.get_by_ids(["a"])
