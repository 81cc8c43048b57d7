"""The vector store: what LlamaIndex adds, changes and deletes, the KV follows."""

from __future__ import annotations

import asyncio
import gc
import threading
import uuid
from pathlib import Path
from typing import Any

import chromadb
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.vector_stores import MetadataFilter, MetadataFilters, SimpleVectorStore, VectorStoreQuery
from llama_index.core.vector_stores.types import BasePydanticVectorStore
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform, CacheClipVectorStore
from llama_index.vector_stores.chroma import ChromaVectorStore

from cacheclip_rag import Backbone, Engine
from cacheclip_rag.corpus import batches


def text(number: int) -> str:
    return f"Chunk number {number}. " + f"It says that the answer to question {number} is {number * 7}. " * 2


def node(number: int, document: str = "a", id_: str | None = None) -> TextNode:
    made = TextNode(id_=id_ or f"{document}{number}", text=text(number), embedding=[1.0, float(number)])
    made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def known(engine: Engine, *numbers: int) -> list[int]:
    return [number for number in numbers if engine.knows(text(number))]


def chroma() -> ChromaVectorStore:
    return ChromaVectorStore(chroma_collection=chromadb.EphemeralClient().create_collection(f"c{uuid.uuid4().hex}"))


@pytest.fixture(params=[SimpleVectorStore, chroma], ids=["simple", "chroma"])
def inner(request: pytest.FixtureRequest) -> BasePydanticVectorStore:
    return request.param()


@pytest.fixture
def store(inner: BasePydanticVectorStore, engine: Engine) -> CacheClipVectorStore:
    """It drops KV at once."""
    return CacheClipVectorStore(inner, engine, show_progress=False, grace=0)


@pytest.fixture
def encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is encoded from now on."""
    seen: list[str] = []
    encode = engine.library.encode_each
    monkeypatch.setattr(engine.library, "encode_each", lambda texts: seen.extend(texts) or encode(texts))
    return seen


def test_class(inner: BasePydanticVectorStore, store: CacheClipVectorStore) -> None:
    assert BasePydanticVectorStore.__name__ in [base.__name__ for base in CacheClipVectorStore.__mro__]
    assert CacheClipVectorStore.class_name() == "CacheClipVectorStore"
    assert store.stores_text == inner.stores_text and store.is_embedding_query == inner.is_embedding_query
    with pytest.raises(TypeError, match="CacheClipLLM"):
        CacheClipVectorStore(inner, "qwen")  # type: ignore[arg-type]


@pytest.mark.behaviour("LlamaIndex", "ingestion: what the vector store adds and deletes, the KV follows")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_added_and_deleted(store: Any, engine: Engine, asynchronous: bool) -> None:
    async def call(name: str, *arguments: Any) -> Any:
        if asynchronous:
            return await getattr(store, {"add": "async_add"}.get(name, f"a{name}"))(*arguments)
        return getattr(store, name)(*arguments)

    assert await call("add", [node(1), node(2), node(3, "b"), node(4, "b")]) == ["a1", "a2", "b3", "b4"]
    assert known(engine, 1, 2, 3, 4) == [1, 2, 3, 4]
    await call("delete", "a")
    assert known(engine, 1, 2, 3, 4) == [3, 4]
    await call("delete_nodes", ["b3"])
    assert known(engine, 3, 4) == [4]
    await call("clear")
    assert known(engine, 4) == []
    assert not store.query(VectorStoreQuery(query_embedding=[1.0, 1.0], similarity_top_k=3)).ids


def test_a_shared_text_stays_until_its_last_node_goes(store: Any, engine: Engine) -> None:
    store.add([node(1, "a"), node(1, "b")])
    store.delete("a")
    assert known(engine, 1) == [1]
    store.delete("b")
    assert known(engine, 1) == []


def test_a_node_written_over(engine: Engine) -> None:
    store = CacheClipVectorStore(SimpleVectorStore(), engine, grace=0)
    store.add([node(1, id_="x")])
    store.add([node(2, id_="x")])
    assert known(engine, 1, 2) == [2]


def test_deleting_no_nodes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for no node in particular, Chroma gives all."""
    inner = chroma()
    monkeypatch.setattr(ChromaVectorStore, "delete_nodes", lambda *arguments: None)
    store = CacheClipVectorStore(inner, engine, grace=0)
    store.add([node(1)])
    store.delete_nodes([])
    assert known(engine, 1) == [1]


def test_deleting_by_filter(engine: Engine) -> None:
    store = CacheClipVectorStore(chroma(), engine, grace=0)
    store.add([node(1, "a"), node(2, "b")])
    store.delete_nodes([n.node_id for n in store.get_nodes(None)], _filters(ref_doc_id="a"))
    assert known(engine, 1, 2) == [2]


def _filters(**values: str) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value) for key, value in values.items()])


@pytest.mark.parametrize("how", ["document", "node", "all"])
def test_what_was_there_before_is_dropped_when_it_is_deleted(engine: Engine, how: str) -> None:
    """As after a restart: the store persists, this object's memory does not."""
    inner = chroma()
    CacheClipVectorStore(inner, engine).add([node(1, "a"), node(2, "b")])
    later = CacheClipVectorStore(inner, engine, grace=0)
    {"document": lambda: later.delete("a"), "node": lambda: later.delete_nodes(["a1"]), "all": later.clear}[how]()
    assert known(engine, 1, 2) == ([] if how == "all" else [2])


@pytest.mark.behaviour("LlamaIndex", "ingestion: upserts encode only what changed")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_upsert_encodes_only_what_changed(
    engine: Engine, encoded: list[str], embedding: Any, asynchronous: bool
) -> None:
    """The pipeline deletes a changed document before it adds the new version of it."""
    pipeline = IngestionPipeline(
        transformations=[SentenceSplitter(chunk_size=60, chunk_overlap=0), embedding],
        vector_store=CacheClipVectorStore(chroma(), engine),
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS_AND_DELETE,
    )

    async def run(*documents: tuple[str, list[int]]) -> None:
        made = [Document(id_=name, text="\n\n\n".join(map(text, numbers))) for name, numbers in documents]
        if asynchronous:
            await pipeline.arun(documents=made)
        else:
            pipeline.run(documents=made)

    await run(("a", [1, 2, 3]), ("b", [4]))
    assert [t.strip() for t in encoded] == [text(i).strip() for i in (1, 2, 3, 4)]
    await run(("a", [1, 2, 3]), ("b", [4]))
    assert len(encoded) == 4
    await run(("a", [1, 5, 3]), ("b", [4]))
    assert len(encoded) == 5 and known(engine, 1, 2, 3, 4, 5) == [1, 3, 4, 5]
    await run(("b", [4, 6]))
    assert len(encoded) == 6 and known(engine, 1, 3, 4, 5, 6) == [4, 6]


@pytest.mark.behaviour("LlamaIndex", "ingestion: insert, update, refresh and delete through an index")
def test_index_insert_refresh_delete(store: Any, engine: Engine, embedding: Any) -> None:
    context = StorageContext.from_defaults(vector_store=store)
    splitter = SentenceSplitter(chunk_size=60, chunk_overlap=0)
    index = VectorStoreIndex.from_documents(
        [Document(id_="a", text=text(1)), Document(id_="b", text=text(2))],
        storage_context=context,
        embed_model=embedding,
        transformations=[splitter],
        store_nodes_override=True,
    )
    index.insert(Document(id_="c", text=text(3)))
    assert known(engine, 1, 2, 3) == [1, 2, 3]
    index.refresh_ref_docs([Document(id_="a", text=text(4)), Document(id_="b", text=text(2))])
    assert known(engine, 1, 2, 3, 4) == [2, 3, 4]
    index.update_ref_doc(Document(id_="b", text=text(5)))
    index.delete_ref_doc("c")
    assert known(engine, 2, 3, 4, 5) == [4, 5]


@pytest.mark.behaviour("LlamaIndex", "ingestion: a cache hit that skips the transform")
@pytest.mark.parametrize("wrapped", [True, False])
def test_an_ingestion_cache_skips_a_transform_but_not_the_store(engine: Engine, embedding: Any, wrapped: bool) -> None:
    """After KV was evicted, ingesting the same documents again makes it again only through the vector store."""

    def pipeline(cache: Any) -> IngestionPipeline:
        steps = [SentenceSplitter(chunk_size=60, chunk_overlap=0), embedding]
        return IngestionPipeline(
            transformations=steps if wrapped else [*steps, CacheClipTransform(engine)],
            vector_store=CacheClipVectorStore(chroma(), engine) if wrapped else chroma(),
            **({"cache": cache} if cache else {}),
        )

    first = pipeline(None)
    first.run(documents=[Document(id_="a", text=text(1))])
    assert known(engine, 1) == [1]
    engine.forget([text(1)])
    pipeline(first.cache).run(documents=[Document(id_="a", text=text(1))])
    assert known(engine, 1) == ([1] if wrapped else [])


def test_deleted_kv_goes_with_the_next_add_or_when_asked_or_after_a_while(engine: Engine) -> None:
    store = CacheClipVectorStore(SimpleVectorStore(), engine)
    store.add([node(1, "a"), node(2, "b"), node(3, "c")])
    store.delete("a")
    assert known(engine, 1) == [1]
    store.add([node(4, "d")])
    assert known(engine, 1) == []
    store.delete("b")
    store.flush()
    assert known(engine, 2, 3, 4) == [3, 4]
    store.delete("c")
    del store
    gc.collect()
    assert known(engine, 3, 4) == [4]  # nobody can bring it back


@pytest.mark.behaviour("LlamaIndex", "ingestion: interrupted and begun again, it goes on where it was")
def test_an_interrupted_ingestion_goes_on_where_it_was(
    tiny_backbone: Backbone, tmp_path: Path, embedding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(engine: Engine) -> None:
        IngestionPipeline(transformations=[embedding], vector_store=CacheClipVectorStore(chroma(), engine)).run(
            nodes=[TextNode(id_=f"n{i}", text=text(i)) for i in range(8)]
        )

    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        encode, seen = engine.library.encode_each, []

        def interrupted(texts: list[str]) -> Any:
            if len(seen) == 3:
                raise KeyboardInterrupt
            seen.extend(texts)
            return encode(texts)

        monkeypatch.setitem(batches.TOGETHER, "cpu", 0)  # one by one
        monkeypatch.setattr(engine.library, "encode_each", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(engine)
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        again: list[str] = []
        encode_again = engine.library.encode_each
        monkeypatch.setattr(engine.library, "encode_each", lambda texts: again.extend(texts) or encode_again(texts))
        run(engine)
        assert again == [text(i) for i in range(3, 8)]


def test_deleted_kv_goes_by_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten, forget = threading.Event(), engine.forget
    monkeypatch.setattr(engine, "forget", lambda texts: (forget(texts), forgotten.set()))
    store = CacheClipVectorStore(SimpleVectorStore(), engine, grace=0.01)
    store.add([node(1, "a"), node(2, "b")])
    store.delete("a")
    assert forgotten.wait(60) and known(engine, 1, 2) == [2]


@pytest.mark.behaviour("LlamaIndex", "ingestion: a failure in encoding loses no vectors")
@pytest.mark.parametrize("broken", ["ensure", "forget"])
async def test_a_failure_in_encoding_does_not_touch_the_store(
    broken: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    store = CacheClipVectorStore(chroma(), engine, grace=0)
    store.add([node(1, "a")])
    monkeypatch.setattr(engine, broken, fail)
    assert store.add([node(2, "b")]) == ["b2"]
    assert await store.async_add([node(3, "b")]) == ["b3"]
    store.delete("a")
    assert [n.node_id for n in store.get_nodes(None)] == ["b2", "b3"]


def test_a_model_that_cannot_be_opened_does_not_stop_ingestion(tmp_path: Path) -> None:
    store = CacheClipVectorStore(chroma(), CacheClipLLM(str(tmp_path)))
    assert store.add([node(1)]) == ["a1"]
    store.delete("a")
    assert not store.get_nodes(None)


@pytest.mark.behaviour("LlamaIndex", "ingestion: a restarted application finds all KV")
def test_a_restarted_application_finds_all_kv(
    tiny_backbone: Backbone, tmp_path: Path, embedding: Any, recorder: Any, keys_of: Any, monkeypatch: Any
) -> None:
    def wrapped(engine: Engine) -> CacheClipVectorStore:
        collection = chromadb.PersistentClient(str(tmp_path / "chroma")).get_or_create_collection("docs")
        return CacheClipVectorStore(ChromaVectorStore(chroma_collection=collection), engine)

    with Engine(tiny_backbone, method="query_guided", store=tmp_path / "kv") as engine:
        IngestionPipeline(transformations=[embedding], vector_store=wrapped(engine)).run(
            nodes=[TextNode(text=text(i), metadata={"page": i, "title": f"About {i}"}) for i in range(4)]
        )
    with Engine(tiny_backbone, method="query_guided", store=tmp_path / "kv") as engine:
        monkeypatch.setattr(engine.library, "encode_each", lambda texts: pytest.fail("encoded again"))
        calls, llm = recorder(engine), CacheClipLLM.from_engine(engine, max_new_tokens=2)
        index = VectorStoreIndex.from_vector_store(wrapped(engine), embed_model=embedding)
        response = index.as_query_engine(llm=llm, similarity_top_k=2).query("What does chunk number 2 say?")
        assert calls.keys() == keys_of(engine, response) and len(calls.keys()) == 2
        texts = [n.node.get_content(MetadataMode.LLM) for n in response.source_nodes]
        assert all(t.startswith("page: ") for t in texts)


async def test_everything_else_is_the_wrapped_stores(inner: Any, store: Any, tmp_path: Path) -> None:
    store.add([node(i) for i in range(4)])
    query = VectorStoreQuery(query_embedding=[0.1, 1.0], similarity_top_k=2)
    assert store.query(query).ids == inner.query(query).ids == (await store.aquery(query)).ids
    assert store.client is inner.client
    if isinstance(inner, ChromaVectorStore):
        assert (
            [n.node_id for n in store.get_nodes(["a1"])]
            == ["a1"]
            == [n.node_id for n in await store.aget_nodes(["a1"])]
        )
        assert store.collection_kwargs == {}
    else:
        store.persist(str(tmp_path / "store.json"))
        assert (
            SimpleVectorStore.from_persist_path(str(tmp_path / "store.json")).query(query).ids == store.query(query).ids
        )
        assert store.get("a1") == [1.0, 1.0]
    with pytest.raises(AttributeError):
        _ = store.no_such_thing


async def test_the_event_loop_stays_free_while_chunks_are_encoded(engine: Engine, monkeypatch: Any) -> None:
    went_round, ensure = threading.Event(), engine.ensure
    monkeypatch.setattr(engine, "ensure", lambda *a, **k: went_round.wait(20) and ensure(*a, **k))
    store = CacheClipVectorStore(SimpleVectorStore(), engine)
    task = asyncio.create_task(store.async_add([node(1)]))
    await asyncio.sleep(0.01)
    went_round.set()
    assert await task == ["a1"] and known(engine, 1) == [1]


def test_a_document_is_dropped_by_its_name_where_the_store_keeps_no_text(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    inner = SimpleVectorStore()
    with Engine(tiny_backbone, method="naive", store=tmp_path) as first:
        CacheClipTransform(first, show_progress=False)([node(1), node(2), node(2, "b")])
        CacheClipVectorStore(inner, first, show_progress=False).add([node(1), node(2), node(2, "b")])
    with Engine(tiny_backbone, method="naive", store=tmp_path) as later:  # that has seen no node
        again = CacheClipVectorStore(inner, later, show_progress=False)
        again.delete("a")
        assert known(later, 1, 2) == [1, 2]  # it may be about to come back
        again.flush()
        assert known(later, 1, 2) == [2]  # another document has it
        again.delete("b")
        again.add([node(2, "b")])
        again.flush()
        assert known(later, 2) == [2]  # it came back


def test_what_another_process_ingested_stays_with_its_document(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with Engine(tiny_backbone, method="naive", store=tmp_path) as other:
        CacheClipTransform(other, show_progress=False)([node(1, "b")])
    with Engine(tiny_backbone, method="naive", store=tmp_path) as engine:
        transform = CacheClipTransform(engine, show_progress=False)
        store = CacheClipVectorStore(SimpleVectorStore(), engine, show_progress=False, grace=0)
        transform([node(1), node(2)])
        store.add([node(1), node(2)])
        transform([node(2)])  # the document has changed
        assert known(engine, 1, 2) == [1, 2]
        store.delete("a")
        assert known(engine, 1, 2) == [1]
        engine.forget_document("b")
        assert known(engine, 1) == []


@pytest.mark.behaviour("LlamaIndex", "ingestion: a store that was filled before it was wrapped")
def test_a_store_that_was_filled_before(inner: BasePydanticVectorStore, engine: Engine) -> None:
    nodes = [node(1), node(2), node(3)]
    inner.add(nodes)
    store = CacheClipVectorStore(inner, engine, show_progress=False, grace=0)
    if not inner.stores_text:
        with pytest.raises(NotImplementedError, match="SimpleVectorStore cannot list"):
            store.ensure_all()
    assert store.ensure_all(None if inner.stores_text else nodes) == 3
    assert known(engine, 1, 2, 3) == [1, 2, 3]
    store.delete_nodes(["a1"])
    assert known(engine, 1, 2, 3) == [2, 3]


def test_a_document_of_an_earlier_process_goes_with_its_deletion(
    inner: BasePydanticVectorStore, engine: Engine
) -> None:
    """Whether the wrapped store can be asked or not: whose chunks these are is kept beside the KV."""
    CacheClipVectorStore(inner, engine, show_progress=False).add([node(1), node(2), node(2, document="b")])
    CacheClipVectorStore(inner, engine, show_progress=False, grace=0).delete("a")
    assert known(engine, 1, 2) == [2]


def test_a_text_that_two_documents_had_goes_with_the_second(store: CacheClipVectorStore, engine: Engine) -> None:
    store.add([node(1), node(1, document="b")])
    store.delete_nodes(["a1"])
    assert known(engine, 1) == [1]
    store.delete_nodes(["b1"])
    assert known(engine, 1) == []
