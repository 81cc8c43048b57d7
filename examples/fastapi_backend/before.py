"""A back end that streams answers from documents."""

import os
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

PROMPT = ChatPromptTemplate.from_template("Answer from these documents.\n\n{documents}\n\nQuestion: {question}")


def backend(model: str, embeddings: Embeddings) -> FastAPI:
    app = FastAPI()
    llm = ChatHuggingFace(llm=HuggingFacePipeline.from_model_id(model, task="text-generation"))
    store = InMemoryVectorStore(embeddings)
    chain = PROMPT | llm | StrOutputParser()

    @app.put("/documents/{name}")
    async def put(name: str, text: str) -> None:
        await store.aadd_documents([Document(text, id=name)])

    @app.delete("/documents/{name}")
    async def delete(name: str) -> None:
        await store.adelete([name])

    @app.get("/answer")
    async def answer(question: str) -> StreamingResponse:
        found = await store.asimilarity_search(question, k=4)
        documents = "\n\n".join(document.page_content for document in found)

        async def pieces() -> AsyncIterator[str]:
            async for piece in chain.astream({"documents": documents, "question": question}):
                yield piece

        return StreamingResponse(pieces(), media_type="text/plain")

    return app


def app() -> FastAPI:
    from langchain_huggingface import HuggingFaceEmbeddings

    return backend(os.environ["MODEL"], HuggingFaceEmbeddings(model_name=os.environ["EMBEDDINGS"]))
