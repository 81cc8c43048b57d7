"""Chunks fused with those they resemble, as a collection grows and shrinks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import Field
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import TextNode
from llama_index.llms.cacheclip import CacheClipTransform

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


def company(engine: Engine, name: str) -> list[list[str]]:
    """With whom a chunk was fused, by name."""
    found = engine._encodings.reuse(engine.method.encode).fused.of(text(name))
    return [[next(n for n in PLACES if n in other) for other in variant] for variant in found if variant]


def nodes(*names: str) -> list[TextNode]:
    return [TextNode(text=text(name)) for name in names]


@pytest.mark.behaviour("LlamaIndex", "ingestion: chunks fused with those they resemble (`fuse=10`)")
def test_chunks_are_fused_with_the_most_similar_and_follow_the_collection(
    tiny_backbone: Backbone, tmp_path: Any
) -> None:
    engine, embed = Engine(tiny_backbone, method="auto", store=tmp_path), Places()
    transform = CacheClipTransform(engine, fuse=1, embed_model=embed, show_progress=False)
    transform(nodes("oak", "ash", "cod"))
    assert [company(engine, name) for name in ("oak", "ash", "cod")] == [[["ash"]], [["oak"]], [["ash"]]]
    transform(nodes("elm", "eel"))
    assert company(engine, "oak") == [["ash"], ["elm"]] and company(engine, "cod") == [["ash"], ["eel"]]
    assert len(embed.asked) == 5  # each once
    engine.forget([text("eel")])
    assert company(engine, "cod") == [["ash"]]  # what was fused with it went with it
    engine.close()

    later = Engine(tiny_backbone, method="auto", store=tmp_path)
    again = CacheClipTransform(later, fuse=1, embed_model=Places(), show_progress=False)
    again(nodes("eel"))  # the others are known from before, and so is what was fused
    assert company(later, "eel") == [["cod"]] and set(map(tuple, company(later, "cod"))) == {("ash",), ("eel",)}


def test_without_fuse_nothing_is_fused_and_nothing_embedded(tiny_backbone: Backbone) -> None:
    engine, embed = Engine(tiny_backbone, method="auto"), Places()
    CacheClipTransform(engine, embed_model=embed, show_progress=False)(nodes("oak", "ash"))
    assert company(engine, "oak") == [] and embed.asked == []


def test_embeddings_that_fail_cost_fusion_and_not_ingestion(tiny_backbone: Backbone, caplog: Any) -> None:
    engine, embed = Engine(tiny_backbone, method="auto"), Places()
    transform = CacheClipTransform(engine, fuse=2, embed_model=embed, show_progress=False)
    embed.broken = True
    with caplog.at_level(logging.ERROR):
        assert len(transform(nodes("oak", "ash"))) == 2
    assert "no neighbours" in caplog.text and engine.knows(text("oak")) and company(engine, "oak") == []
    embed.broken = False
    transform(nodes("elm"))  # what was missed is made up for
    assert company(engine, "oak") == [["elm", "ash"]]
