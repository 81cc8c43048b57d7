"""Chunks fused with those they resemble, as a collection grows and shrinks."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform, CacheClipVectorStore

from cacheclip_rag import Backbone, Engine

PLACES = {"oak": 0.0, "elm": 0.1, "ash": 0.2, "eel": 1.4, "cod": 1.5}


def text(name: str) -> str:
    return (
        f"All that the guild knows of the {name} is written here, in so many words that it makes a chunk of some size."
    )


class Places(BaseEmbedding):
    """Trees lie near trees and fish near fish."""

    asked: list[str] = Field(default_factory=list)
    broken: bool = False

    def _get_text_embedding(self, text: str) -> list[float]:
        if self.broken:
            raise ConnectionError("no embeddings today")
        self.asked.append(text)
        place = next(place for name, place in PLACES.items() if name in text)
        return [1.0 - place, place]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def context(engine: Engine, name: str) -> list[list[str]]:
    """With whom a chunk was fused, by name."""
    return [[next(n for n in PLACES if n in other) for other in variant] for variant in engine.fused(text(name))]


def nodes(*names: str) -> list[TextNode]:
    return [TextNode(text=text(name)) for name in names]


@pytest.mark.behaviour("LlamaIndex", "ingestion: chunks fused with those they resemble (`fuse=10`)")
def test_chunks_are_fused_with_the_most_similar_and_follow_the_collection(
    tiny_backbone: Backbone, tmp_path: Any
) -> None:
    engine, embed = Engine(tiny_backbone, method="auto", store=tmp_path), Places()
    transform = CacheClipTransform(engine, fuse=1, embed_model=embed, show_progress=False)
    transform(nodes("oak", "ash", "cod"))
    assert [context(engine, name) for name in ("oak", "ash", "cod")] == [[["ash"]], [["oak"]], [["ash"]]]
    transform(nodes("elm", "eel"))
    assert context(engine, "oak") == [["ash"], ["elm"]] and context(engine, "cod") == [["ash"], ["eel"]]
    assert len(embed.asked) == 5  # each once
    engine.forget([text("eel")])
    assert context(engine, "cod") == [["ash"]]  # what was fused with it went with it
    engine.close()

    later = Engine(tiny_backbone, method="auto", store=tmp_path)
    again = CacheClipTransform(later, fuse=1, embed_model=Places(), show_progress=False)
    again(nodes("eel"))  # the others are known from before, and so is what was fused
    assert context(later, "eel") == [["cod"]] and set(map(tuple, context(later, "cod"))) == {("ash",), ("eel",)}


def test_without_fuse_nothing_is_fused_and_nothing_embedded(tiny_backbone: Backbone) -> None:
    engine, embed = Engine(tiny_backbone, method="auto"), Places()
    CacheClipTransform(engine, embed_model=embed, show_progress=False)(nodes("oak", "ash"))
    assert context(engine, "oak") == [] and embed.asked == []


def test_embeddings_that_fail_cost_fusion_and_not_ingestion(tiny_backbone: Backbone, caplog: Any) -> None:
    engine, embed = Engine(tiny_backbone, method="auto"), Places()
    transform = CacheClipTransform(engine, fuse=2, embed_model=embed, show_progress=False)
    embed.broken = True
    with caplog.at_level(logging.ERROR):
        assert len(transform(nodes("oak", "ash"))) == 2
    assert "no neighbours" in caplog.text and engine.knows(text("oak")) and context(engine, "oak") == []
    embed.broken = False
    transform(nodes("elm"))  # what was missed is made up for
    assert context(engine, "oak") == [["elm", "ash"]]


def of(document: str, *names: str, version: str = "") -> list[TextNode]:
    made = [TextNode(text=text(name) + version) for name in names]
    for node in made:
        node.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


def test_a_changed_document_is_not_fused_with_what_it_was_in_an_earlier_process(
    tiny_backbone: Backbone, tmp_path: Any
) -> None:
    """Though nothing has told this process that the old version goes."""
    with Engine(tiny_backbone, method="auto", store=tmp_path) as engine:
        CacheClipTransform(engine, fuse=1, embed_model=Places(), show_progress=False)(
            [*of("trees", "oak"), *of("fish", "cod")]
        )
    with Engine(tiny_backbone, method="auto", store=tmp_path) as engine:
        transform = CacheClipTransform(engine, fuse=1, embed_model=Places(), show_progress=False)
        transform(of("trees", "oak", version=" As of now."))
        assert engine.fused(text("oak") + " As of now.") == [(text("cod"),)]


@pytest.mark.parametrize("kept", ["the same text", "another text"])
def test_a_document_of_an_earlier_process_that_is_changed_through_the_store_leaves_no_old_kv(
    tiny_backbone: Backbone, tmp_path: Any, kept: str
) -> None:
    """A store that cannot be asked for its nodes: only the notes tell what the document was."""
    inner = SimpleVectorStore()
    for version in ("", " As of now."):
        with Engine(tiny_backbone, method="auto", store=tmp_path) as engine:
            store = CacheClipVectorStore(inner, engine, show_progress=False, stores_text=False)
            transform = CacheClipTransform(engine, show_progress=False)
            new = [*of("trees", "oak", version=version), *of("trees", "elm"), *of("woods", "ash")]
            for node in new:
                node.embedding = [1.0, 0.0]
            if version:
                store.delete("trees")
                new = new[:2] if kept == "the same text" else new[:1]
            store.add(list(transform(new)))
    known = [engine.knows(text("oak") + version) for version in ("", " As of now.")]
    assert known == [False, True] and engine.knows(text("elm")) == (kept == "the same text")
    assert engine.knows(text("ash"))


def test_what_was_deleted_and_comes_back_is_fused_again(tiny_backbone: Backbone) -> None:
    engine = Engine(tiny_backbone, method="auto")
    transform = CacheClipTransform(engine, fuse=1, embed_model=Places(), show_progress=False)
    transform(nodes("oak", "elm", "cod"))
    engine.forget([text("elm")])
    transform(nodes("elm"))
    assert [context(engine, name) for name in ("oak", "elm", "cod")] == [[["elm"]], [["oak"]], [["elm"]]]


def test_a_transform_that_fuses_can_be_pickled_and_copied(tiny_folder: Any) -> None:
    llm = CacheClipLLM(str(tiny_folder), method="auto", tenant="travelling")
    transform = CacheClipTransform(llm, fuse=1, embed_model=Places(), show_progress=False)
    transform(nodes("oak", "elm"))
    copy.deepcopy(transform)(nodes("oak", "ash"))
    assert context(llm.engine, "ash") == [["elm"]]
    travelled = pickle.loads(pickle.dumps(transform))
    travelled(nodes("cod"))  # here the engine is open; it begins with no embeddings
    assert context(llm.engine, "cod") == [["ash"]]
    unfusing = pickle.loads(pickle.dumps(CacheClipTransform(llm)))
    assert unfusing._fuser is None and travelled._fuser is not None


def test_embeddings_that_the_nodes_come_with_are_used(tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, embed = Engine(tiny_backbone, method="auto"), Places()
    monkeypatch.setattr(Settings, "_embed_model", embed)
    embedded = embed(nodes("oak", "elm", "cod"))  # as a step of a pipeline
    asked = list(embed.asked)
    transform = CacheClipTransform(engine, fuse=1, show_progress=False)
    transform(embedded)
    assert embed.asked == asked and context(engine, "oak") == [["elm"]]
    transform(nodes("eel"))
    assert embed.asked == [*asked, text("eel")] and context(engine, "eel") == [["cod"]]
    other = CacheClipTransform(engine, fuse=1, embed_model=Places(), show_progress=False)
    other(embedded)  # whose model is another than the pipeline's
    assert len(other._fuser._embed.model.asked) == 4


@pytest.mark.parametrize("given", [None, "local:nowhere"])
def test_no_embedding_model_is_said_to_be_wanted(
    tiny_backbone: Backbone, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_embed_model", None)
    monkeypatch.delenv("IS_TESTING", raising=False)
    monkeypatch.setitem(sys.modules, "llama_index.embeddings.openai", None)
    monkeypatch.setitem(sys.modules, "llama_index.embeddings.huggingface", None)
    with pytest.raises(ValueError, match=r"embed_model=\.\.\.\) or Settings\.embed_model"):
        CacheClipTransform(Engine(tiny_backbone, method="auto"), fuse=2, embed_model=given)


def test_what_is_asked_about_together_is_fused_while_nothing_is_asked(tiny_folder: Any) -> None:
    for allowed in (False, True):
        llm = CacheClipLLM(str(tiny_folder), fuse_when_idle=allowed, max_new_tokens=1, tenant="idle")
        try:
            CacheClipTransform(llm, show_progress=False)(nodes("oak", "cod"))
            for _ in range(2):
                llm.complete(f"{text('oak')}\n\n{text('cod')}\n\nWhich of them swims?")
            llm.engine.flush()
            assert context(llm.engine, "cod") == ([["oak"]] if allowed else [])
        finally:
            llm.close()
