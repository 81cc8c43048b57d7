"""Time to first token with KV on disk against the same prompt with KV in memory: medians of rounds in one process.

    python benchmarks/loading.py --model qwen2.5-coder-0.5b-instruct --tokens 2000 --rounds 7

Each round has a new prompt of ten chunks, fused in another order, and answers it in every way, in rotating order, after
one answer that counts for nothing (it leaves the prompt's preamble, and warms what can be warmed): with all KV in
memory; from files in the page cache; from files that were dropped from it, so that they are read from the disk; and the
last once more with the chunks announced by `Engine.hint` just before, as a retriever does. Ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import median

from speed import chunks_of, drop_page_cache, first_token, forget_memory, fuse, prompt_of

from cacheclip_rag import Engine
from cacheclip_rag.report import Report

WAYS = ("memory", "page cache", "disk", "disk, announced")
QUESTION = "What do these passages propose, and why?"


def answer(engine: Engine, way: str, chunks: list[str], prompt: str, folder: Path) -> Report:
    if way != "memory":
        forget_memory(engine)
    if way.startswith("disk"):
        drop_page_cache(folder)
    if way.endswith("announced"):
        engine.hint(chunks, QUESTION)
    report = first_token(engine, prompt, QUESTION, "auto", None)
    assert not report.fallbacks and report.reused, report
    return report


def measure(engine: Engine, tokens: int, rounds: int, folder: Path) -> dict:
    generator, rows = random.Random(tokens), []
    for number in range(rounds):
        chunks = chunks_of(engine, tokens, generator)
        engine.ensure(chunks)
        fuse(engine, chunks, "auto")
        prompt = prompt_of(engine, chunks, QUESTION)
        answer(engine, "memory", chunks, prompt, folder)
        row: dict[str, Report] = {}
        for way in (WAYS * 2)[number % len(WAYS) :][: len(WAYS)]:
            if way == "memory":  # what was loaded for the way before may have left something out
                answer(engine, way, chunks, prompt, folder)
            row[way] = answer(engine, way, chunks, prompt, folder)
        rows.append(row)
    memory = [row["memory"].ttft for row in rows]
    return {
        "prompt tokens": median(row["memory"].prompt_tokens for row in rows),
        "first token, KV in memory (s)": round(median(memory), 3),
        "times as long": {
            way: round(median(row[way].ttft / row["memory"].ttft for row in rows), 3) for way in WAYS[1:]
        },
        "waited for loading (ms)": {
            way: round(1e3 * median(row[way].seconds.get("load", 0.0) for row in rows), 1) for way in WAYS
        },
        "placing (ms)": round(1e3 * median(row["memory"].seconds.get("place", 0.0) for row in rows), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the files are to be; the temporary folder by default")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        Engine(options.model, store=folder) as engine,
    ):
        print(json.dumps(measure(engine, options.tokens, options.rounds, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
