"""The framework's own Hugging Face LLM and ours: the same application gives the same answers at ratio 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llama_index.core import VectorStoreIndex
from llama_index.llms.cacheclip import CacheClipLLM

from cacheclip_rag import Engine
from cacheclip_rag.weights.pull import resolve

huggingface = pytest.importorskip("llama_index.llms.huggingface")


def test_the_same_answers(smollm2: Engine, passages_index: VectorStoreIndex) -> None:
    name = str(resolve("smollm2-135m-instruct"))
    theirs = huggingface.HuggingFaceLLM(
        model_name=name,
        tokenizer_name=name,
        is_chat_model=True,
        max_new_tokens=16,
        generate_kwargs={"do_sample": False},
        device_map="cpu",
        model_kwargs={"dtype": torch.float32},
    )
    ours = CacheClipLLM.from_engine(smollm2, max_new_tokens=16, recompute_ratio=1)

    def answers(llm: Any) -> list[str]:
        engine = passages_index.as_query_engine(llm=llm, similarity_top_k=2)
        chat = passages_index.as_chat_engine(chat_mode="context", llm=llm, similarity_top_k=2)
        asked = ["Who built the lighthouse at Cape Morrow?", "What did the railway carry?"]
        return [str(engine.query(q)).strip() for q in asked] + [str(chat.chat(q)).strip() for q in asked]

    expected = answers(theirs)
    assert all(expected) and answers(ours) == expected
