"""Fixtures: tiny random models with a byte tokenizer, engines that note their requests, embeddings by words."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from langchain_cacheclip import ChatCacheClip
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from recording import Calls, asked, record, script
from tiny import PASSAGES, TEMPLATE, two_layers

from cacheclip_rag import Backbone, Engine


class Words(Embeddings):
    """Texts with the same words are near each other."""

    def embed_query(self, text: str) -> list[float]:
        vector = [0.0] * 256
        for word in re.findall(r"\w+", text.lower()):
            vector[int(hashlib.md5(word.encode()).hexdigest(), 16) % 256] += 1
        length = math.sqrt(sum(x * x for x in vector)) or 1.0
        return [x / length for x in vector]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture(scope="session")
def recorder() -> Callable[[Engine], Calls]:
    return record


@pytest.fixture(scope="session")
def noting() -> Callable[[Engine], list[str]]:
    return asked


@pytest.fixture
def scripted(engine: Engine) -> Iterator[Callable[..., None]]:
    yield lambda *answers: script(engine, *answers)
    engine.backbone.__dict__.pop("generate", None)


@pytest.fixture(scope="session")
def writing() -> Callable[..., None]:
    """For an engine that the test opened itself."""
    return script


@pytest.fixture(scope="session")
def keys_of() -> Callable[[Engine, Sequence[Document]], list[str]]:
    return lambda engine, documents: [engine.library.key(document.page_content) for document in documents]


@pytest.fixture(scope="session")
def embedding() -> Words:
    return Words()


@pytest.fixture(scope="session")
def documents_of() -> Callable[..., list[Document]]:
    """Documents with metadata, of the passages or of as many made-up ones as asked for."""

    def make(count: int | None = None) -> list[Document]:
        if count is None:
            return [
                Document(id=f"p{i}", page_content=t, metadata={"source": f"p{i}.txt"}) for i, t in enumerate(PASSAGES)
            ]
        return [
            Document(
                id=f"n{i}",
                page_content=f"Entry number {i}: on day {i * 7 + 3} the clerk of room {i * 13 + 5} noted that parcel "
                f"P{i * 31 + 11} had arrived from warehouse {i * 17 + 2}.",
                metadata={"source": f"n{i}.txt"},
            )
            for i in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def backbone_of() -> Callable[..., Backbone]:
    return two_layers


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    return two_layers()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, for what has to open engines by name."""
    folder = tmp_path_factory.mktemp("tiny")
    backbone = two_layers()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(tiny_backbone: Backbone) -> Iterator[Engine]:
    with Engine(tiny_backbone, method="query_guided") as engine:
        yield engine


@pytest.fixture
def informed(engine: Engine) -> Engine:
    """It knows the passages."""
    assert engine.ensure(PASSAGES).encoded == len(PASSAGES)
    return engine


@pytest.fixture
def plain_engine() -> Iterator[Engine]:
    """Its chat template knows no tools."""
    with Engine(two_layers(TEMPLATE), method="query_guided") as engine:
        yield engine


@pytest.fixture
def llm(engine: Engine) -> ChatCacheClip:
    return ChatCacheClip.from_engine(engine, max_tokens=6)


@pytest.fixture(scope="session")
def prompt() -> str:
    """A question behind three known passages, as a chain would write it."""
    context = "\n\n".join(PASSAGES[:3])
    return f"Context information is below.\n{context}\n\nQuestion: Who built the lighthouse?"
