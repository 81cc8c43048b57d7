"""Ingestion: every chunk encoded once, found again after a restart, dropped when its document no longer has it."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import chromadb
import llama_index.core
import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import MetadataMode, NodeRelationship, RelatedNodeInfo, TextNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor
from llama_index.vector_stores.chroma import ChromaVectorStore

from cacheclip_rag import Backbone, Engine


@pytest.fixture
def chroma() -> ChromaVectorStore:
    return ChromaVectorStore(chroma_collection=chromadb.EphemeralClient().create_collection(f"c{uuid.uuid4().hex}"))


@pytest.fixture
def documents(nodes_of: Any) -> list[Document]:
    """Two of several chunks each."""
    texts = [node.text for node in nodes_of()]
    return [
        Document(id_="coast", text="\n\n".join(texts[:3]), metadata={"topic": "coast"}),
        Document(id_="inland", text="\n\n".join(texts[3:]), metadata={"topic": "inland"}),
    ]


def splitter() -> SentenceSplitter:
    return SentenceSplitter(chunk_size=70, chunk_overlap=10)


def node(text: str, document: str | None) -> TextNode:
    made = TextNode(text=text)
    if document is not None:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def text(number: int) -> str:
    return f"Chunk number {number}. " + f"It says that the answer to question {number} is {number * 7}. " * 2


def test_class(engine: Engine) -> None:
    assert TransformComponent.__name__ in [base.__name__ for base in CacheClipTransform.__mro__]
    assert CacheClipTransform.class_name() == "CacheClipTransform"


@pytest.mark.behaviour("LlamaIndex", "ingestion: a restarted application finds all KV")
def test_a_restarted_application_finds_all_kv(
    tiny_backbone: Backbone,
    tmp_path: Path,
    chroma: ChromaVectorStore,
    documents: list[Document],
    embedding: Any,
    recorder: Any,
    keys_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        pipeline = IngestionPipeline(
            transformations=[splitter(), embedding, CacheClipTransform(engine)], vector_store=chroma
        )
        nodes = pipeline.run(documents=documents)
    assert len(nodes) > 4

    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        monkeypatch.setattr(engine.library, "encode_each", lambda texts: pytest.fail("encoded again"))
        calls, llm = recorder(engine), CacheClipLLM.from_engine(engine, max_new_tokens=4)
        query_engine = VectorStoreIndex.from_vector_store(chroma, embed_model=embedding).as_query_engine(
            llm=llm, similarity_top_k=3, node_postprocessors=[CacheClipPostprocessor(llm, on_miss="encode")]
        )
        response = query_engine.query("Who built the lighthouse?")
        assert calls.keys() == keys_of(engine, response) and len(calls.keys()) == 3
        assert engine.ensure([n.get_content(metadata_mode=MetadataMode.LLM) for n in nodes]).encoded == 0


async def test_nodes_come_back_as_they_were(engine: Engine, nodes_of: Any) -> None:
    nodes, transform = nodes_of(), CacheClipTransform(engine, show_progress=False)
    before = [n.to_json() for n in nodes]
    assert transform(nodes) is nodes and await transform.acall(nodes) is nodes
    assert [n.to_json() for n in nodes] == before
    assert all(engine.knows(n.get_content(metadata_mode=MetadataMode.LLM)) for n in nodes)


@pytest.mark.behaviour("LlamaIndex", "ingestion: a failure in encoding loses no vectors")
@pytest.mark.parametrize("broken", ["ensure", "forget"])
def test_failing_to_encode_does_not_lose_a_documents_vectors(
    broken: str,
    engine: Engine,
    chroma: ChromaVectorStore,
    documents: list[Document],
    embedding: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With upserts the old vectors are gone by the time a transform runs."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    pipeline = IngestionPipeline(
        transformations=[splitter(), embedding, CacheClipTransform(engine)],
        vector_store=chroma,
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
        disable_cache=True,
    )
    pipeline.run(documents=documents)
    monkeypatch.setattr(engine, broken, fail)
    changed = Document(id_="coast", text="The lighthouse is gone now. " * 5)
    assert pipeline.run(documents=[changed, documents[1]])
    stored = chroma.client.get(where={"ref_doc_id": "coast"})
    assert any("gone now" in text for text in stored["documents"])


@pytest.mark.behaviour("LlamaIndex", "ingestion: with the transform alone, replaced chunks are forgotten")
def test_replaced_chunks_are_forgotten_unless_another_document_has_them(engine: Engine) -> None:
    transform, other = CacheClipTransform(engine), CacheClipTransform(engine)
    transform([node(text(1), "a"), node(text(2), "a"), node(text(3), "a"), node(text(2), "b"), node(text(9), None)])
    other([node(text(3), "elsewhere")])
    transform([node(text(1), "a"), node(text(4), "a")])
    known = {i for i in (1, 2, 3, 4, 9) if engine.knows(text(i))}
    assert known == {1, 2, 3, 4, 9}  # 2 is in b, 3 in a document of another pipeline
    transform([node(text(4), "a")])
    assert not engine.knows(text(1)) and engine.knows(text(4))
    transform([node(text(5), "b")])
    assert not engine.knows(text(2))


def test_one_document_split_two_ways_keeps_both(engine: Engine) -> None:
    fine, coarse = CacheClipTransform(engine), CacheClipTransform(engine)
    fine([node(text(1), "a"), node(text(2), "a")])
    coarse([node(text(1) + text(2), "a")])
    fine([node(text(1), "a"), node(text(2), "a")])
    assert all(engine.knows(t) for t in (text(1), text(2), text(1) + text(2)))


def test_a_document_is_forgotten_after_a_restart_but_for_what_others_have(
    tiny_backbone: Backbone, tmp_path: Path
) -> None:
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        transform = CacheClipTransform(engine)
        transform([node(text(1), "one"), node(text(2), "one"), node(text(2), "two"), node(text(4), None)])
        transform([node(text(3), "one"), node(text(2), "one")])  # the document as it is now
        assert [engine.knows(text(number)) for number in (1, 2, 3, 4)] == [False, True, True, True]
    with Engine(tiny_backbone, method="query_guided", store=tmp_path) as engine:
        engine.forget_document("one")
        assert [engine.knows(text(number)) for number in (2, 3, 4)] == [True, False, True]


def test_unchanged_chunks_are_encoded_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = engine.library.encode_each
    monkeypatch.setattr(engine.library, "encode_each", lambda texts: encoded.extend(texts) or encode(texts))
    transform = CacheClipTransform(engine)
    transform([node(text(1), "a"), node(text(2), "a")])
    transform([node(text(2), "a"), node(text(3), "a")])
    assert encoded == [text(i) for i in (1, 2, 3)]


@pytest.mark.behaviour("LlamaIndex", "chunks of another model are misses, not errors")
def test_another_model_is_another_ingestion_cache_key(
    engine: Engine, tiny_backbone: Backbone, narrow_backbone: Backbone, nodes_of: Any
) -> None:
    nodes = nodes_of()
    with (
        Engine(narrow_backbone, method="query_guided") as narrow,
        Engine(tiny_backbone, auxiliary=narrow_backbone) as with_auxiliary,
    ):
        engines = [engine, engine, narrow, with_auxiliary]
        first, again, other, auxiliary = [get_transformation_hash(nodes, CacheClipTransform(e)) for e in engines]
    assert first == again and len({first, other, auxiliary}) == 3
    assert CacheClipTransform(engine).fingerprint == engine.library.namespace.digest
    assert first == get_transformation_hash(nodes, CacheClipTransform(engine, show_progress=False))


@pytest.mark.behaviour("LlamaIndex", "worker processes")
@pytest.mark.timeout(300)
def test_workers_defer_and_the_postprocessor_makes_up_for_it(
    tiny_folder: Path,
    documents: list[Document],
    embedding: Any,
    recorder: Any,
    keys_of: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # LlamaIndex ships tiktoken's file, but tells tiktoken only where it makes the tokenizer, not where it unpickles it.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))
    llm = CacheClipLLM(model_name=str(tiny_folder), max_new_tokens=4)
    try:
        transform = CacheClipTransform(llm)
        nodes = IngestionPipeline(transformations=[splitter(), transform]).run(documents=documents, num_workers=2)
        plain = IngestionPipeline(transformations=[splitter()]).run(documents=documents)
        assert [n.get_content() for n in nodes] == [n.get_content() for n in plain]
        assert not any(llm.engine.knows(n.get_content(metadata_mode=MetadataMode.LLM)) for n in nodes)

        calls = recorder(llm.engine)
        query_engine = VectorStoreIndex(list(nodes), embed_model=embedding).as_query_engine(
            llm=llm, similarity_top_k=2, node_postprocessors=[CacheClipPostprocessor(llm, on_miss="encode")]
        )
        response = query_engine.query("Who built the lighthouse?")
        assert calls.keys() == keys_of(llm.engine, response) and len(calls.keys()) == 2
    finally:
        llm.close()
