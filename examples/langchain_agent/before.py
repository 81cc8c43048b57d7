"""An agent that searches documents."""

from typing import Any

from langchain.agents import create_agent
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.tools import tool
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline


def agent(model: str, documents: list[Document], embeddings: Embeddings) -> Any:
    llm = ChatHuggingFace(llm=HuggingFacePipeline.from_model_id(model, task="text-generation"))
    store = InMemoryVectorStore(embeddings)
    store.add_documents(documents)

    @tool
    def search(query: str) -> str:
        """Search the documents."""
        return "\n\n".join(document.page_content for document in store.similarity_search(query, k=3))

    return create_agent(llm, [search])
