"""The compressor and its runnable: the engine is told, the documents are as they were."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_cacheclip import CacheClipCompressor, ChatCacheClip, cacheclip_warm
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda

from cacheclip_rag import Engine


@pytest.fixture
def retrieved(documents_of: Any) -> list[Document]:
    return documents_of()[:3]


@pytest.mark.behaviour("LangChain", "retrieved texts come back untouched")
@pytest.mark.parametrize("on_miss", ["background", "encode", "ignore"])
async def test_documents_come_back_as_they_were(llm: ChatCacheClip, retrieved: list[Document], on_miss: Any) -> None:
    before = [document.model_dump_json() for document in retrieved]
    compressor, step = CacheClipCompressor(llm, on_miss=on_miss), cacheclip_warm(llm, on_miss=on_miss)
    assert isinstance(compressor, BaseDocumentCompressor)
    for result in [
        compressor.compress_documents(retrieved, "Who?"),
        await compressor.acompress_documents(retrieved, "Who?"),
        DocumentCompressorPipeline(transformers=[compressor]).compress_documents(retrieved, "Who?"),
        step.invoke(retrieved),
        await step.ainvoke(retrieved),
        step.invoke({"context": retrieved, "input": "Who?"})["context"],
        (RunnableLambda(lambda _: retrieved) | step).invoke("Who?"),
    ]:
        assert all(a is b for a, b in zip(result, retrieved, strict=True))
    assert [document.model_dump_json() for document in retrieved] == before


@pytest.mark.parametrize("source", ["llm", "engine", "bound"])
def test_misses(llm: ChatCacheClip, engine: Engine, retrieved: list[Document], source: str) -> None:
    given: Any = {"llm": llm, "engine": engine, "bound": llm.bind(stop=["x"]).with_config(tags=["t"])}[source]
    texts = [document.page_content for document in retrieved]
    CacheClipCompressor(given, on_miss="ignore").compress_documents(retrieved, "Who?")
    engine.flush()
    assert not any(engine.knows(text) for text in texts)
    CacheClipCompressor(given, on_miss="encode").compress_documents(retrieved[:1], "Who?")
    assert [engine.knows(text) for text in texts] == [True, False, False]
    CacheClipCompressor(given).compress_documents(retrieved, "Who?")
    engine.flush()
    assert all(engine.knows(text) for text in texts)


def test_the_engine_is_told_chunks_and_question(
    engine: Engine, retrieved: list[Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(engine, "hint", lambda texts, question=None: told.append((texts, question)))
    texts = [document.page_content for document in retrieved]
    CacheClipCompressor(engine).compress_documents([*retrieved, Document("too short")], "Who built it?")
    cacheclip_warm(engine).invoke(retrieved)
    cacheclip_warm(engine).invoke({"context": retrieved, "question": "Who built it?", "n": [1]})
    assert told == [(texts, "Who built it?"), (texts, None), (texts, "Who built it?")]


@pytest.mark.parametrize("broken", ["hint", "knows", "ensure"])
def test_it_never_raises(
    engine: Engine, retrieved: list[Document], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, broken, fail)
    assert CacheClipCompressor(engine, on_miss="encode").compress_documents(retrieved, "?") is retrieved
    assert cacheclip_warm(engine, on_miss="encode").invoke(retrieved) is retrieved


def test_not_even_when_the_model_cannot_be_opened(retrieved: list[Document], tmp_path: Any) -> None:
    llm = ChatCacheClip(str(tmp_path))
    assert CacheClipCompressor(llm).compress_documents(retrieved, "?") is retrieved
    assert cacheclip_warm(llm).invoke(42) == 42


def test_wrong_source() -> None:
    for wrong in ("qwen", None):
        with pytest.raises(TypeError, match="ChatCacheClip"):
            CacheClipCompressor(wrong)
        with pytest.raises(TypeError, match="ChatCacheClip"):
            cacheclip_warm(wrong)  # type: ignore[arg-type]
