"""Time to first token of an application with the framework's own Hugging Face LLM and with ours, on the same prompts.

    python benchmarks/frameworks.py --model qwen2.5-coder-0.5b-instruct --framework llama-index

A LlamaIndex query engine or a LangChain chain over ten pieces of the shipped PEPs, all of them retrieved. Ratio 1 shows
whether the answers are the same; the default ratio shows the speedup to the first token, including retrieval. Both are
asked alternately, and the speedup is the median over pairs. The chunks' KV is in memory.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from speed import chunks_of

from cacheclip_rag import Engine
from cacheclip_rag.weights.pull import resolve

QUESTIONS = (
    "Which of these proposals was accepted?",
    "What is the first document about?",
    "What would have to change in existing programs?",
    "Who wrote these documents?",
)
ANSWER = 24  # tokens

Ask = Callable[[str], Iterator[str]]
"""Streams the application's answer."""
Apps = tuple[Ask, Callable[[float | None], Ask]]
"""The application with the framework's own LLM; and with ours, at a recompute ratio (None for the default)."""


def llama_index(engine: Engine, folder: str, chunks: list[str]) -> Apps:
    from llama_index.core import MockEmbedding, VectorStoreIndex
    from llama_index.core.schema import TextNode
    from llama_index.llms.cacheclip import CacheClipLLM
    from llama_index.llms.huggingface import HuggingFaceLLM
    from llama_index.postprocessor.cacheclip import CacheClipPostprocessor

    index = VectorStoreIndex([TextNode(text=chunk) for chunk in chunks], embed_model=MockEmbedding(8))

    def app(llm: Any, **options: Any) -> Ask:
        engine = index.as_query_engine(llm=llm, similarity_top_k=len(chunks), streaming=True, **options)
        return lambda question: engine.query(question).response_gen

    theirs = HuggingFaceLLM(
        model_name=folder,
        tokenizer_name=folder,
        is_chat_model=True,
        context_window=8192,
        max_new_tokens=ANSWER,
        generate_kwargs={"do_sample": False},
        device_map="cpu",
        model_kwargs={"dtype": engine.backbone.dtype},
    )

    def ours(ratio: float | None) -> Ask:
        given = {} if ratio is None else {"recompute_ratio": ratio}
        llm = CacheClipLLM.from_engine(engine, max_new_tokens=ANSWER, **given)
        return app(llm, node_postprocessors=[CacheClipPostprocessor(llm)])

    return app(theirs), ours


def langchain(engine: Engine, folder: str, chunks: list[str]) -> Apps:
    from langchain_cacheclip import CacheClipVectorStore, ChatCacheClip
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnablePassthrough
    from langchain_core.vectorstores import InMemoryVectorStore
    from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline

    prompt = ChatPromptTemplate.from_template("Answer from these documents.\n\n{documents}\n\nQuestion: {question}")
    store = CacheClipVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), engine, show_progress=False)
    store.add_texts(chunks)
    retriever = store.as_retriever(search_kwargs={"k": len(chunks)})

    def app(llm: Any) -> Ask:
        documents = retriever | (lambda found: "\n\n".join(document.page_content for document in found))
        chain = {"documents": documents, "question": RunnablePassthrough()} | prompt | llm | StrOutputParser()
        return chain.stream

    pipeline = HuggingFacePipeline.from_model_id(
        folder,
        task="text-generation",
        model_kwargs={"dtype": engine.backbone.dtype},
        pipeline_kwargs={"max_new_tokens": ANSWER, "do_sample": False, "return_full_text": False},
    )

    def ours(ratio: float | None) -> Ask:
        given = {} if ratio is None else {"recompute_ratio": ratio}
        return app(ChatCacheClip.from_engine(engine, max_tokens=ANSWER, **given))

    return app(ChatHuggingFace(llm=pipeline)), ours


FRAMEWORKS = {"llama-index": llama_index, "langchain": langchain}


def timed(ask: Ask, question: str) -> tuple[float, str]:
    """Seconds to the first piece of the answer, and the whole of it."""
    start = time.perf_counter()
    pieces = iter(ask(question))
    answer = next(pieces, "")
    while not answer:  # some stream an empty beginning
        answer = next(pieces)
    first = time.perf_counter() - start
    return first, (answer + "".join(pieces)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--tokens", type=int, default=2000, help="of the ten chunks together")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="llama-index")
    arguments = parser.parse_args()
    print(
        f"{arguments.framework}, {arguments.model}, {arguments.tokens} tokens, {torch.get_num_threads()} threads, "
        f"{platform.machine()}, torch {torch.__version__}\n"
    )
    with Engine(arguments.model, method="query_guided") as engine:
        chunks = chunks_of(engine, arguments.tokens, random.Random(0))
        engine.ensure(chunks)
        theirs, ours = FRAMEWORKS[arguments.framework](engine, str(resolve(arguments.model)), chunks)
        computing, reusing = ours(1.0), ours(None)
        for ask in (theirs, computing, reusing):
            timed(ask, "Which documents are these?")  # warms up
        print("| question | their first token | ours at the default ratio | speedup | same answer at ratio 1 |")
        print("|---|---|---|---|---|")
        ratios, same = [], 0
        for question in QUESTIONS:
            (slow, expected), (quick, _), (_, answer) = (timed(ask, question) for ask in (theirs, reusing, computing))
            ratios.append(slow / quick)
            same += answer == expected
            verdict = "yes" if answer == expected else "no"
            print(f"| {question} | {slow:.1f} s | {quick:.1f} s | {slow / quick:.1f}x | {verdict} |", flush=True)
        print(
            f"\nmedian {median(ratios):.1f} times faster to the first token; "
            f"{same} of {len(QUESTIONS)} answers the same at ratio 1"
        )


if __name__ == "__main__":
    main()
