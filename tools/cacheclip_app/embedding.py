"""Sentence embeddings by name, for LlamaIndex."""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.embeddings import BaseEmbedding

NAME = "all-minilm-l6-v2"


class MiniLM(BaseEmbedding):
    """all-MiniLM-L6-v2 through sentence-transformers, on the CPU. Weights are loaded at the first use."""

    _model: Any = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(model_name=NAME, embed_batch_size=32, **fields)

    def load(self) -> MiniLM:
        """Load the weights now. Raises what `cacheclip_rag.weights.pull.resolve` raises."""
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            from cacheclip_rag.weights.pull import resolve

            self._model = SentenceTransformer(str(resolve(NAME)), device="cpu")
        return self

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self.load()._model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)
