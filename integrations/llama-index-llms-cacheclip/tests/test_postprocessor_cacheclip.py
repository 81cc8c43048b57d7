"""The postprocessor: nodes untouched, misses repaired, failures silent."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.llms.cacheclip import CacheClipLLM
from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

from cacheclip_rag import Engine


@pytest.fixture
def retrieved(nodes_of: Any) -> list[NodeWithScore]:
    return [NodeWithScore(node=node, score=0.5) for node in nodes_of()[:3]]


@pytest.fixture
def texts(retrieved: list[NodeWithScore]) -> list[str]:
    return [n.node.get_content(MetadataMode.LLM) for n in retrieved]


def test_class() -> None:
    assert BaseNodePostprocessor.__name__ in [base.__name__ for base in CacheClipPostprocessor.__mro__]
    assert CacheClipPostprocessor.class_name() == "CacheClipPostprocessor"


@pytest.mark.behaviour("LlamaIndex", "retrieved texts come back untouched")
@pytest.mark.parametrize("on_miss", ["background", "encode", "ignore"])
async def test_nodes_come_back_as_they_were(
    llm: CacheClipLLM, retrieved: list[NodeWithScore], texts: list[str], on_miss: str
) -> None:
    before = [n.model_dump_json() for n in retrieved]
    postprocessor = CacheClipPostprocessor(llm, on_miss=on_miss)
    for result in [
        postprocessor.postprocess_nodes(retrieved, query_str="Who?"),
        postprocessor.postprocess_nodes(retrieved),
        await postprocessor.apostprocess_nodes(retrieved, query_bundle=QueryBundle("Who?")),
    ]:
        assert all(a is b for a, b in zip(result, retrieved, strict=True))
    assert [n.model_dump_json() for n in retrieved] == before


@pytest.mark.parametrize("source", ["llm", "engine"])
def test_misses(
    llm: CacheClipLLM, engine: Engine, retrieved: list[NodeWithScore], texts: list[str], source: str
) -> None:
    given = llm if source == "llm" else engine
    assert texts[0].startswith("file: lighthouse.txt")  # what the LLM sees has the metadata in front
    CacheClipPostprocessor(given, on_miss="ignore").postprocess_nodes(retrieved, query_str="Who?")
    engine.flush()
    assert not any(engine.knows(text) for text in texts)
    CacheClipPostprocessor(given, on_miss="encode").postprocess_nodes(retrieved[:1], query_str="Who?")
    assert [engine.knows(text) for text in texts] == [True, False, False]
    CacheClipPostprocessor(given).postprocess_nodes(retrieved, query_str="Who?")
    engine.flush()
    assert all(engine.knows(text) for text in texts)


def test_the_engine_is_told_chunks_and_question(
    engine: Engine, retrieved: list[NodeWithScore], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(engine, "hint", lambda texts, question=None: told.append((texts, question)))
    postprocessor = CacheClipPostprocessor(engine, on_miss="ignore")
    postprocessor.postprocess_nodes(retrieved, query_str="Who built it?")
    postprocessor.postprocess_nodes(retrieved)
    assert told == [(texts, "Who built it?"), (texts, None)]


@pytest.mark.parametrize("broken", ["hint", "knows", "ensure"])
def test_it_never_raises(
    engine: Engine, retrieved: list[NodeWithScore], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, broken, fail)
    assert CacheClipPostprocessor(engine, on_miss="encode").postprocess_nodes(retrieved, query_str="?") is retrieved


def test_not_even_when_the_model_cannot_be_opened(retrieved: list[NodeWithScore], tmp_path: Any) -> None:
    llm = CacheClipLLM(model_name=str(tmp_path))
    assert CacheClipPostprocessor(llm).postprocess_nodes(retrieved, query_str="?") is retrieved


def test_wrong_source() -> None:
    with pytest.raises(TypeError, match="CacheClipLLM"):
        CacheClipPostprocessor("qwen")  # type: ignore[arg-type]
