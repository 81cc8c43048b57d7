"""Ingestion of ten thousand chunks through a framework: interrupted, resumed, repeated, and with changes.

    python benchmarks/ingestion.py --model smollm2-135m-instruct --chunks 10000 --framework llama-index

The chunks are passages of the shipped PEPs, cut at random, each a document of its own; embeddings are the frameworks'
mock ones, since only KV is measured. `IngestionPipeline` with upserts, or `index()` with incremental clean-up, runs
four times: interrupted at two fifths, to its end, without changes, and with one document in a hundred changed. Before
that, encoding in batches is compared with encoding one by one, in paired runs.
"""

from __future__ import annotations

import argparse
import platform
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from speed import CORPUS

from cacheclip_rag import Engine
from cacheclip_rag.corpus.batches import batch_characters, batches

Run = Callable[[list[str]], Any]
"""Ingests the documents, in the order of their numbers."""


def passages(count: int, characters: int, generator: random.Random) -> list[str]:
    corpus = "\n".join(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt")))
    starts = (generator.randrange(len(corpus) - characters) for _ in range(count))
    return [f"Passage {number}. {corpus[start : start + characters].strip()}" for number, start in enumerate(starts)]


def llama_index(engine: Engine) -> Run:
    from llama_index.core import Document, MockEmbedding
    from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
    from llama_index.core.storage.docstore import SimpleDocumentStore
    from llama_index.core.vector_stores import SimpleVectorStore
    from llama_index.llms.cacheclip import CacheClipTransform, CacheClipVectorStore

    pipeline = IngestionPipeline(
        transformations=[MockEmbedding(8), CacheClipTransform(engine)],
        docstore=SimpleDocumentStore(),
        docstore_strategy=DocstoreStrategy.UPSERTS,
        vector_store=CacheClipVectorStore(SimpleVectorStore(), engine, grace=0),
        disable_cache=True,
    )
    return lambda texts: pipeline.run(documents=[Document(doc_id=str(n), text=text) for n, text in enumerate(texts)])


def langchain(engine: Engine) -> Run:
    from langchain_cacheclip import CacheClipVectorStore
    from langchain_core.documents import Document
    from langchain_core.embeddings import DeterministicFakeEmbedding
    from langchain_core.indexing import InMemoryRecordManager, index
    from langchain_core.vectorstores import InMemoryVectorStore

    records = InMemoryRecordManager("passages")
    records.create_schema()
    store = CacheClipVectorStore(InMemoryVectorStore(DeterministicFakeEmbedding(size=8)), engine)
    return lambda texts: index(
        [Document(text, metadata={"source": str(n)}) for n, text in enumerate(texts)],
        records,
        store,
        cleanup="incremental",
        source_id_key="source",
        key_encoder="sha256",
    )


FRAMEWORKS = {"llama-index": llama_index, "langchain": langchain}


def speedup(engine: Engine, texts: list[str], pairs: int = 5) -> float:
    """How many times faster chunks are encoded that share a forward: the median of paired runs."""
    ratios = []
    groups = batches(texts, batch_characters(engine.backbone.device))
    for _, group in zip(range(pairs + 1), groups, strict=False):
        start = time.perf_counter()
        for text in group:
            engine.library.encode(text)
        middle = time.perf_counter()
        engine.library.encode_each(group)
        ratios.append((middle - start) / (time.perf_counter() - middle))
    return median(ratios[1:])  # the first one warms up


def interrupt_at(engine: Engine, count: int) -> None:
    """Raise KeyboardInterrupt, as Ctrl-C does, once so many chunks are known."""

    def look(*_: Any) -> None:
        if len(engine.index) >= count:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)


def measured(engine: Engine, run: Run, texts: list[str], name: str) -> None:
    encoded = 0
    encode = engine.library.encode_each

    def counting(group: list[str]) -> Any:
        nonlocal encoded
        made = encode(group)
        encoded += len(group)
        return made

    engine.library.encode_each = counting  # type: ignore[method-assign,assignment]
    start = time.perf_counter()
    try:
        run(texts)
    except KeyboardInterrupt:
        pass
    engine.library.encode_each = encode  # type: ignore[method-assign]
    known = sum(engine.knows(text) for text in texts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"| {name} | {encoded:,} | {known:,} | {time.perf_counter() - start:.0f} s | {peak:,} MiB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--chunks", type=int, default=10_000)
    parser.add_argument("--characters", type=int, default=200, help="of a chunk")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="llama-index")
    parser.add_argument("--memory", type=int, default=512, help="MiB for chunk KV; the rest is on disk only")
    arguments = parser.parse_args()
    print(
        f"{arguments.model}, {torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}; "
        f"{arguments.chunks:,} chunks of {arguments.characters} characters, {arguments.framework}\n"
    )
    generator = random.Random(0)
    texts = passages(arguments.chunks, arguments.characters, generator)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "memory_bytes": arguments.memory * 2**20,
            "store": Path(folder),
            "disk_bytes": 100 * 2**30,
        }
        with Engine(arguments.model, method="query_guided", **options) as engine:
            print(f"in batches {speedup(engine, texts):.2f} times faster than one by one\n")
            run = FRAMEWORKS[arguments.framework](engine)
            print("| run | encoded | known after it | time | peak memory of the process |\n|---|---|---|---|---|")
            interrupt_at(engine, 2 * len(texts) // 5)
            measured(engine, run, texts, "interrupted at two fifths")
            measured(engine, run, texts, "to its end")
            measured(engine, run, texts, "again")
            for number in generator.sample(range(len(texts)), len(texts) // 100):
                texts[number] += " Amended."
            measured(engine, run, texts, "a hundredth changed")
            engine.flush()
            print(f"\nknown in all, what was replaced forgotten: {len(engine.index):,}")


if __name__ == "__main__":
    main()
