"""Throughput and time to first token of one engine with several users, relative to one user.

    python benchmarks/concurrency.py --model smollm2-135m-instruct --users 1 4 16

Every user is a thread that asks one question after another about four stored chunks of the shipped PEPs, and reads a
short streamed answer. The questions are the same for any number of users. Also measured: tokens a second of streams
that decode together, all behind their first token, with and without drafts; and the cost of recognising ten chunks in a
prompt among 10,000 known ones.
"""

from __future__ import annotations

import argparse
import platform
import random
import threading
import time
from queue import Empty, SimpleQueue
from statistics import median

import torch
from speed import CORPUS, chunks_of, prompt_of

from cacheclip_rag import Engine
from cacheclip_rag.prompt import ChunkIndex


def ask_all(engine: Engine, prompts: list[str], users: int, tokens: int) -> tuple[float, list[float], list[str]]:
    """Seconds for all prompts, seconds to the first token of each (including waiting), and the answers."""
    questions: SimpleQueue[int] = SimpleQueue()
    for number in range(len(prompts)):
        questions.put(number)
    first, answers = [0.0] * len(prompts), [""] * len(prompts)

    def user() -> None:
        while True:
            try:
                number = questions.get_nowait()
            except Empty:
                return
            start = time.perf_counter()
            stream = engine.stream(prompts[number], max_new_tokens=tokens, min_new_tokens=tokens)
            answers[number] = next(stream)
            first[number] = time.perf_counter() - start
            answers[number] += "".join(stream)

    threads = [threading.Thread(target=user) for _ in range(users)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start, first, answers


def users_table(engine: Engine, users: list[int], requests: int, tokens: int) -> None:
    generator = random.Random(0)
    chunks = chunks_of(engine, 1500, generator)
    engine.ensure(chunks)
    prompts = [
        prompt_of(engine, generator.sample(chunks, 4), f"Question {number}: what is proposed, and why?")
        for number in range(requests)
    ]
    ask_all(engine, prompts[:2], 1, tokens)  # warms everything up
    alone: tuple[float, float, list[str]] | None = None
    print("| users | throughput | median time to first token | slowest | answers as alone |\n|---|---|---|---|---|")
    for number in users:
        seconds, first, answers = ask_all(engine, prompts, number, tokens)
        if alone is None:
            alone = seconds, median(first), answers
            print(f"| {number} | {requests / seconds:.2f} a second | {median(first):.2f} s | {max(first):.2f} s | |")
            continue
        equal = sum(a == b for a, b in zip(answers, alone[2], strict=True))
        print(
            f"| {number} | {alone[0] / seconds:.2f} times | {median(first) / alone[1]:.1f} times "
            f"| {max(first) / alone[1]:.1f} times | {equal}/{requests} |",
            flush=True,
        )


def decoding_rate(engine: Engine, prompts: list[str], tokens: int) -> float:
    """Tokens a second of all streams together, from when each has its first token."""
    begun = threading.Barrier(len(prompts) + 1)

    def read(prompt: str) -> None:
        stream = engine.stream(prompt, max_new_tokens=tokens, min_new_tokens=tokens)
        next(stream)
        begun.wait()
        for _ in stream:
            pass

    threads = [threading.Thread(target=read, args=(prompt,), daemon=True) for prompt in prompts]
    for thread in threads:
        thread.start()
    begun.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return len(prompts) * (tokens - 1) / (time.perf_counter() - start)


def streams_table(engine: Engine, streams: list[int], tokens: int, context: int, rounds: int = 3) -> None:
    generator = random.Random(1)
    chunks = chunks_of(engine, context, generator)
    engine.ensure(chunks)
    prompts = [
        prompt_of(engine, generator.sample(chunks, len(chunks)), f"Question {number}: what is proposed, and why?")
        for number in range(max(streams))
    ]
    plain = Engine(engine.backbone, method="query_guided", prompt_lookup=0)
    plain.ensure(chunks)
    print(f"\n| streams, {context:,} tokens of context | tokens a second together | without drafts |\n|---|---|---|")
    for number in streams:
        rates = [[decoding_rate(one, prompts[:number], tokens) for one in (engine, plain)] for _ in range(rounds)]
        drafted, alone = (median(each) for each in zip(*rates, strict=True))
        print(f"| {number} | {drafted:.1f} | {alone:.1f} |", flush=True)


def recognition(count: int = 10_000, size: int = 1600, trials: int = 20) -> None:
    """CPU time to find ten chunks, or none, in a prompt of 17,000 characters, with ``count`` known chunks."""
    generator = random.Random(0)
    corpus = " ".join(path.read_text(encoding="utf-8") for path in sorted(CORPUS.glob("*.txt")))
    words = sorted({word for word in corpus.split() if word.isalpha()})

    def text() -> str:
        made = " ".join(generator.choices(words, k=size // 5))
        return made[:size].strip()

    index, texts = ChunkIndex(), [text() for _ in range(count)]
    start = time.process_time()
    for number, known in enumerate(texts):
        index.add(str(number), known)
    adding = time.process_time() - start
    found = "\n\n".join(generator.sample(texts, 10)) + "\n\nWhat is proposed?"
    missed = "\n\n".join(text() for _ in range(10)) + "\n\nWhat is proposed?"
    assert len(index.find(found)) == 10 and not index.find(missed)
    for name, prompt in (("ten known chunks", found), ("nothing known", missed)):
        times = []
        for _ in range(trials):
            start = time.process_time()
            index.find(prompt)
            times.append(time.process_time() - start)
        print(
            f"recognition, {count} chunks known, prompt of {len(prompt)} characters, {name}: "
            f"{1000 * median(times):.1f} ms of CPU"
        )
    print(f"adding a chunk to the index: {1e6 * adding / count:.0f} µs of CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--users", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--streams", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer, for --streams")
    parser.add_argument("--context", type=int, default=2000, help="tokens of context, for --streams")
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{args.model} on {machine}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with Engine(args.model, method="query_guided") as engine:
        if args.users:
            users_table(engine, args.users, args.requests, args.tokens)
        if args.streams:
            streams_table(engine, args.streams, args.answer, args.context)
    recognition()


if __name__ == "__main__":
    main()
