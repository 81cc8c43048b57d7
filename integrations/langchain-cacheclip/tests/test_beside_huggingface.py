"""The framework's own Hugging Face chat model and ours: the same chain gives the same answers at ratio 1.

langchain-huggingface asks for an older huggingface_hub than transformers does, so it is not part of the test extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_cacheclip import CacheClipVectorStore, ChatCacheClip
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore

huggingface = pytest.importorskip("langchain_huggingface")
PROMPT = ChatPromptTemplate.from_template("Answer from these documents.\n\n{documents}\n\nQuestion: {question}")


def test_the_same_answers(tiny_folder: Path, documents_of: Any, embedding: Any) -> None:
    pipeline = huggingface.HuggingFacePipeline.from_model_id(
        str(tiny_folder),
        task="text-generation",
        pipeline_kwargs={"max_new_tokens": 16, "do_sample": False, "return_full_text": False},
    )
    theirs = huggingface.ChatHuggingFace(llm=pipeline)
    ours = ChatCacheClip(str(tiny_folder), max_tokens=16, recompute_ratio=1, dtype="float32")
    try:
        store = CacheClipVectorStore(InMemoryVectorStore(embedding), ours, show_progress=False)
        store.add_documents(documents_of())

        def answers(llm: Any) -> list[str]:
            chain = PROMPT | llm | StrOutputParser()
            asked = []
            for question in ("Who built the lighthouse?", "What did the railway carry?"):
                found = store.similarity_search(question, k=3)
                documents = "\n\n".join(document.page_content for document in found)
                asked.append(chain.invoke({"documents": documents, "question": question}))
            return asked

        expected = answers(theirs)
        assert all(expected) and answers(ours) == expected
    finally:
        ours.close()
