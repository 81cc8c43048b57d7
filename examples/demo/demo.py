"""Answers the same questions twice with the same model: by full prefill, and reusing the stored KV of chunks.

    python examples/demo/demo.py [--model NAME] [--auxiliary NAME] [--questions N]

The first run encodes the corpus and keeps its KV and embeddings under .cacheclip/demo; later runs start from there.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORE = Path(".cacheclip") / "demo"
CHUNK = 320  # tokens
TOP_K = 6
WARM_UP = "When is a Python release candidate made?"

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # no warnings about forks
logging.basicConfig(level=logging.ERROR)

try:
    import chromadb
    from llama_index.core import Document, VectorStoreIndex
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.query_engine import BaseQueryEngine
    from llama_index.core.schema import BaseNode, MetadataMode
    from llama_index.llms.cacheclip import CacheClipLLM, CacheClipTransform
    from llama_index.postprocessor.cacheclip import CacheClipPostprocessor
    from llama_index.vector_stores.chroma import ChromaVectorStore
    from rich.console import Console
    from rich.table import Table

    from cacheclip_rag import CacheClipError, Report
except ImportError as error:
    sys.exit(f"{error}\nThe demo needs: pip install -e '.[demo]' -e integrations/llama-index-llms-cacheclip")

console = Console(highlight=False, soft_wrap=True)


class MiniLM(BaseEmbedding):
    """all-MiniLM-L6-v2 through sentence-transformers."""

    _model: Any = PrivateAttr()

    def __init__(self, **fields: Any) -> None:
        from sentence_transformers import SentenceTransformer

        from cacheclip_rag.weights.pull import resolve

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


@dataclass(frozen=True)
class Question:
    text: str
    hint: str
    """A text that a right answer contains."""


@dataclass(frozen=True)
class Answer:
    text: str
    first: float
    """Seconds from the question to the first piece of the answer, retrieval included."""
    report: Report


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Show what is being done, and then how long it took."""
    start = time.perf_counter()
    with console.status(f"{what} ..."):
        yield
    console.print(f"[dim]{what}: {time.perf_counter() - start:.1f} s[/dim]")


def read_corpus() -> list[Document]:
    documents = []
    for path in sorted((HERE / "corpus").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        documents.append(Document(id_=path.stem, text=text, metadata={"title": text.split(". ")[0]}))
    return documents


def read_questions() -> list[Question]:
    lines = (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" -> ") for line in lines if line.strip() and not line.startswith("#")]
    return [Question(text.strip(), hint.strip()) for text, hint in pairs]


def vectors(documents: list[Document]) -> ChromaVectorStore:
    """The persistent Chroma collection of just this corpus, cut just this way."""
    digest = hashlib.sha256("".join([str(CHUNK), *(d.text for d in documents)]).encode()).hexdigest()[:16]
    settings = chromadb.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(str(STORE / "chroma"), settings=settings)
    return ChromaVectorStore(chroma_collection=client.get_or_create_collection(f"peps-{digest}"))


def ingest(llm: CacheClipLLM, store: ChromaVectorStore, embedding: MiniLM, documents: list[Document]) -> None:
    """Fill the vector store and the KV store, unless they are filled."""
    transform = CacheClipTransform(llm)
    if store.client.count():
        encode(llm, transform, store.get_nodes(node_ids=None))
        return
    console.print(f"\nFirst run: reading {len(documents)} documents once.")
    # The vector store is filled last, so that an interrupted first run can be resumed.
    splitter = SentenceSplitter(chunk_size=CHUNK, chunk_overlap=20)
    pipeline = IngestionPipeline(
        transformations=[splitter, embedding, transform], vector_store=store, disable_cache=True
    )
    start = time.perf_counter()
    nodes = pipeline.run(documents=documents)
    seconds = time.perf_counter() - start
    console.print(f"{len(nodes)} chunks embedded, their KV computed and kept in {STORE / 'kv'}: {seconds:.0f} s")


def encode(llm: CacheClipLLM, transform: CacheClipTransform, nodes: list[BaseNode]) -> None:
    texts = [node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes]
    missing = sum(not llm.engine.knows(text) for text in texts)
    start = time.perf_counter()
    transform(nodes)  # with its own progress bar; stored chunks are skipped
    if missing:
        seconds = time.perf_counter() - start
        console.print(f"KV of {missing} chunks computed in {seconds:.0f} s and kept in {STORE / 'kv'}")
    else:
        console.print(f"KV of {len(texts)} chunks found in {STORE / 'kv'}, nothing encoded")


def ask(query_engine: BaseQueryEngine, llm: CacheClipLLM, question: str, label: str | None = None) -> Answer:
    """Answer one question; with a ``label``, the answer is printed as it is streamed."""
    if label:
        console.print(f"  [bold]{label:15}[/bold]", end="")
    text, first, start = "", 0.0, time.perf_counter()
    for piece in query_engine.query(question).response_gen:
        first = first or (time.perf_counter() - start if piece else 0.0)
        text += piece
        if label:
            print(piece.replace("\n", " "), end="", flush=True)
    report = llm.last_report()
    assert report is not None
    if label:
        console.print(f"\n{'':17}[dim]first token after {first:.2f} s: {tokens(report)}[/dim]")
    return Answer(text.strip(), first, report)


def tokens(report: Report) -> str:
    if not report.cached_tokens:
        return f"{report.prompt_tokens:,} tokens computed"
    return (
        f"{report.reused:,} tokens reused, {report.recomputed:,} recomputed, {report.fresh:,} new, "
        f"{report.prefix:,} from the cached prompt prefix; {len(report.chunks)} chunks"
    )


def compare(
    index: VectorStoreIndex, llm: CacheClipLLM, full: CacheClipLLM, questions: list[Question]
) -> list[tuple[Question, Answer, Answer]]:
    reusing = index.as_query_engine(
        llm=llm, similarity_top_k=TOP_K, streaming=True, node_postprocessors=[CacheClipPostprocessor(llm)]
    )
    reading = index.as_query_engine(llm=full, similarity_top_k=TOP_K, streaming=True)
    with stage("warming up both ways with another question"):
        ask(reading, full, WARM_UP)
        ask(reusing, llm, WARM_UP)
    results = []
    for number, question in enumerate(questions):
        console.print(f"\n[bold cyan]{number + 1}. {question.text}[/bold cyan]")
        answers = {}
        for way in ("without reuse", "with reuse")[:: -1 if number % 2 else 1]:  # neither always goes first
            engine, model = (reusing, llm) if way == "with reuse" else (reading, full)
            answers[way] = ask(engine, model, question.text, way)
        results.append((question, answers["without reuse"], answers["with reuse"]))
    return results


def summarise(results: list[tuple[Question, Answer, Answer]]) -> None:
    table = Table(title="\nSeconds to the first token", title_justify="left")
    table.add_column("question", max_width=32, no_wrap=True)
    for column in ("tokens", "without", "reuse", "speedup", "answer"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for question, slow, fast in results:
        table.add_row(
            question.text,
            f"{fast.report.prompt_tokens:,}",
            f"{slow.first:.2f}",
            f"{fast.first:.2f}",
            f"{slow.first / fast.first:.1f}x",
            "same" if slow.text == fast.text else "other",
        )
    console.print(table)
    speedup = statistics.median(slow.first / fast.first for _, slow, fast in results)
    same = sum(slow.text == fast.text for _, slow, fast in results)
    right = [sum(q.hint.lower() in a[way].text.lower() for q, *a in results) for way in (0, 1)]
    count = len(results)
    console.print(f"Median: [bold]{speedup:.1f} times faster[/bold] to the first token with reuse.")
    console.print(
        f"Identical answers: {same} of {count}; answers that contain the expected text: "
        f"{right[0]} of {count} without reuse, {right[1]} of {count} with."
    )
    console.print(
        "[dim]Times include retrieval. With reuse, the prompt's preamble (instructions before the first chunk) comes "
        "from the prefix cache; without, nothing is cached.[/dim]"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Answers questions twice with one model: by full prefill, and reusing stored chunk KV."
    )
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct", help="a catalogue name, hub id or folder")
    parser.add_argument("--auxiliary", default="none", help="a small model that selects the tokens to recompute")
    parser.add_argument("--recompute-ratio", type=float, help="0 (plain reuse) to 1 (full prefill)")
    parser.add_argument("--questions", type=int, metavar="N", help="ask only the first N")
    options = parser.parse_args()
    auxiliary = None if options.auxiliary == "none" else options.auxiliary

    shared: dict[str, Any] = dict(auxiliary=auxiliary, kv_dir=STORE / "kv", max_new_tokens=48)
    llm = CacheClipLLM(options.model, recompute_ratio=options.recompute_ratio, **shared)
    full = CacheClipLLM(options.model, method="full", **shared)  # the same engine, so the same weights
    documents, questions = read_corpus(), read_questions()[: options.questions]
    with stage(f"loading {options.model}" + (f" and {auxiliary}" if auxiliary else "")):
        quiet()
        context_length = llm.metadata.context_window
    with stage("loading all-minilm-l6-v2"):
        embedding = MiniLM()
    if context_length < TOP_K * CHUNK * 2:
        sys.exit(
            f"{options.model} has a context length of {context_length} tokens: too small for {TOP_K} chunks of {CHUNK}"
        )
    store = vectors(documents)
    ingest(llm, store, embedding, documents)
    summarise(compare(VectorStoreIndex.from_vector_store(store, embed_model=embedding), llm, full, questions))


def quiet() -> None:
    """Switch off the progress bars of transformers, which would interrupt ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    try:
        main()
    except CacheClipError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; what was encoded is kept.")
