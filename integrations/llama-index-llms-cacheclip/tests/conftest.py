"""Fixtures: a tiny random model where only the mechanics matter, SmolLM2 where answers do, MiniLM for retrieval."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.llms.cacheclip import CacheClipLLM
from recording import Calls, asked, record, script
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cacheclip_rag import Backbone, Engine
from cacheclip_rag.weights.pull import resolve

PASSAGES = {
    "lighthouse": "The lighthouse at Cape Morrow was built in 1874 by the engineer Ada Lindqvist. Its lamp burned "
    "whale oil until the keeper, Tomas Reyes, installed a paraffin burner, which doubled its range to nineteen "
    "nautical miles.",
    "railway": "The harbour railway of Port Ellery opened in 1880. It carried herring, timber and, in summer, bathers, "
    "and closed in 1957, when the road bridge over the Senn was finished.",
    "memoir": "Marguerite Okafor drove the last train. Her memoir, Steam and Salt, sold eleven thousand copies and won "
    "the Coastal Prize; a film was planned, but the turntable could not be moved to the studio.",
    "bakery": "Sourdough at the Quay Bakery rests for thirty hours. The starter was brought from Lisbon by Inês Prado "
    "in 1921 and has been fed with rye flour every morning since, wars and strikes included.",
    "observatory": "The observatory on Mount Karo has a refractor of forty centimetres. In 1934 its director, Piet "
    "Vos, saw a nova there eleven hours before anybody else, and forgot to send the telegram.",
    "orchard": "Bram Tolliver grafts pears onto quince roots. His orchard in the Ister valley grows sixty-three "
    "varieties, one of which, the Winter Constable, is sold only by post.",
}


class MiniLM(BaseEmbedding):
    """Real sentence embeddings, without a package of their own."""

    _model: Any = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__(model_name="all-minilm-l6-v2", **fields)
        self._model = SentenceTransformer(str(resolve("all-minilm-l6-v2")), device="cpu")

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)


def wanted(engine: Engine, response: Any) -> list[str]:
    """Keys of the chunks that a response is made from."""
    return [engine.library.key(n.node.get_content(MetadataMode.LLM)) for n in response.source_nodes]


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
def keys_of() -> Callable[[Engine, Any], list[str]]:
    return wanted


@pytest.fixture(scope="session")
def embedding() -> MiniLM:
    return MiniLM()


@pytest.fixture(scope="session")
def nodes_of() -> Callable[..., list[TextNode]]:
    """Nodes with metadata, of the passages or of as many made-up ones as asked for."""

    def make(count: int | None = None) -> list[TextNode]:
        if count is None:
            return [TextNode(id_=k, text=t, metadata={"file": f"{k}.txt"}) for k, t in PASSAGES.items()]
        return [
            TextNode(
                id_=f"n{i}",
                text=f"Entry number {i}: on day {i * 7 + 3} the clerk of room {i * 13 + 5} noted that parcel "
                f"P{i * 31 + 11} had arrived from warehouse {i * 17 + 2}, weighing {i + 40} kilograms.",
            )
            for i in range(count)
        ]

    return make


def _tiny(window: int) -> tuple[LlamaForCausalLM, Any]:
    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m-instruct"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        initializer_range=0.25,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).float(), tokenizer


@pytest.fixture(scope="session")
def tiny_backbone() -> Backbone:
    return Backbone(*_tiny(4096))


@pytest.fixture(scope="session")
def narrow_backbone() -> Backbone:
    """Its window has room for 128 tokens."""
    return Backbone(*_tiny(128))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder, for what has to open engines by name."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = _tiny(4096)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(tiny_backbone: Backbone) -> Iterator[Engine]:
    with Engine(tiny_backbone, method="query_guided") as engine:
        yield engine


@pytest.fixture
def informed(engine: Engine) -> Engine:
    """It knows the passages."""
    assert engine.ensure(PASSAGES.values()).encoded == len(PASSAGES)
    return engine


@pytest.fixture
def llm(engine: Engine) -> CacheClipLLM:
    return CacheClipLLM.from_engine(engine, max_new_tokens=6)


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Engine]:
    """The real model, float32, with the passages known."""
    with Engine("smollm2-135m-instruct", method="query_guided", dtype="float32") as engine:
        assert engine.ensure(PASSAGES.values()).encoded == len(PASSAGES)
        yield engine


@pytest.fixture(scope="session")
def passages_index(embedding: MiniLM, nodes_of: Callable[..., list[TextNode]]) -> VectorStoreIndex:
    return VectorStoreIndex(nodes_of(), embed_model=embedding)


@pytest.fixture(scope="session")
def prompt() -> str:
    """A question behind three known passages, as a synthesizer would write it."""
    context = "\n\n".join(list(PASSAGES.values())[:3])
    return (
        f"Context information is below.\n{context}\nGiven the context, answer the question.\n"
        "Question: Who built the lighthouse at Cape Morrow?\nAnswer: "
    )
