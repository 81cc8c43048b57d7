"""FusionRAG's many-question scenario: throughput with chunk reuse, with prefix caching and without reuse, by users.

    python benchmarks/many_questions.py DATA --model qwen2.5-coder-0.5b-instruct --users 1 4 8

``DATA`` is a folder with ``qa.jsonl`` whose questions share passages, in other orders and company (XQuAD, as FusionRAG,
arXiv 2601.12904, builds it). Everything runs in this engine, in one process over the same weights: full prefill; prefix
caching, which begins empty; chunk reuse with chunks encoded alone; and with chunks fused as the prompt of the question
before theirs about the same passages held them. The order is shuffled in every round. Ratios are medians over rounds
(throughput) and questions (first token); F1 stands beside them.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import mean, median
from typing import Any

import torch
from cacheclip_eval.bench import machine
from cacheclip_eval.data import Item, prompt, read, shortened
from cacheclip_eval.metrics import f1

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.weights.pull import resolve

SYSTEMS = {
    "no reuse": "full",
    "prefix reuse": "prefix-cache",
    "chunk reuse": "auto:fused=False",
    "chunk reuse, fused": "auto",
}
BASE = "no reuse"
FRESH = {"prefix reuse"}
"""Systems that keep something of each prompt: every run begins without it."""


def about_few(items: Sequence[Item], questions: int) -> tuple[list[Item], list[Item]]:
    """``questions`` items about as few articles as hold so many, and as many other ones about the same: the earlier
    prompts that chunks are fused in. In the order of the file, articles mixed.
    """
    articles: dict[str, list[Item]] = {}
    for item in items:
        articles.setdefault(str(item.meta.get("article", "")), []).append(item)
    chosen: list[list[Item]] = []
    for group in sorted(articles.values(), key=len, reverse=True):
        if sum(len(each) // 2 for each in chosen) >= questions:
            break
        chosen.append(group)
    asked = [item for group in chosen for item in group[::2]]
    earlier = [item for group in chosen for item in group[1::2]]
    draw = random.Random(0)
    return draw.sample(asked, min(questions, len(asked))), draw.sample(earlier, min(questions, len(earlier)))


def ask(engine: Engine, prompts: Sequence[str], method: str, users: int, tokens: int) -> dict[str, Any]:
    """Seconds to each first token and in all; each user asks one question after another."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(len(prompts)):
        waiting.put(number)
    first, answers = [0.0] * len(prompts), [""] * len(prompts)
    cached, failed = [0] * len(prompts), list[BaseException]()

    def user() -> None:
        try:
            while True:
                number = waiting.get_nowait()
                start = time.perf_counter()
                stream = engine.stream(prompts[number], method=method, max_new_tokens=tokens)
                answers[number] = next(stream, "")
                first[number] = time.perf_counter() - start
                answers[number] += "".join(stream)
                cached[number] = stream.report.cached_tokens
        except Empty:
            return
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=user) for _ in range(users)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return {"seconds": time.perf_counter() - start, "first": first, "answers": answers, "cached": sum(cached)}


def table(items: Sequence[Item], results: dict[str, list[dict[str, Any]]], tokens: int) -> Iterator[str]:
    """``tokens``: of all prompts together."""
    yield "| | questions a minute | against no reuse | first token, median | against no reuse | p95 | cached | F1 |"
    yield "|---" * 8 + "|"
    base = results.get(BASE, [])
    for name, runs in results.items():
        first = sorted(seconds for one in runs for seconds in one["first"])
        gains = [plain["seconds"] / mine["seconds"] for plain, mine in zip(base, runs, strict=False)]
        sooner = [
            a / b
            for plain, mine in zip(base, runs, strict=False)
            for a, b in zip(plain["first"], mine["first"], strict=True)
        ]
        cells = [
            f"{median(60 * len(items) / one['seconds'] for one in runs):.1f}",
            f"{median(gains):.1f}x" if gains else "",
            f"{median(first):.2f} s",
            f"{median(sooner):.1f}x" if sooner else "",
            f"{first[int(0.95 * (len(first) - 1))]:.2f} s",
            f"{mean(one['cached'] for one in runs) / tokens:.0%}",
            f"{mean(f1(text, item.answers) for text, item in zip(runs[0]['answers'], items, strict=True)):.3f}",
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--passages", type=int, help="at most so many of each question's")
    parser.add_argument("--tokens", type=int, default=16, help="the longest answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, help="append the results to this JSONL file as well")
    args = parser.parse_args()
    asked, earlier = (
        [shortened(item, args.passages) for item in items]
        for items in about_few(read(args.data / "qa.jsonl"), args.questions)
    )
    backbone = Backbone.load(resolve(args.model))
    prompts = [prompt(item, backbone) for item in asked]
    lengths = [len(backbone.tokenise_prompt(text).ids) for text in prompts]
    texts = list(dict.fromkeys(passage.chunk for item in asked for passage in item.passages))
    print(f"{args.model}, {machine()}")
    print(f"{len(asked)} questions about {len(texts)} passages, {median(lengths):.0f} tokens a prompt")
    engine, start = Engine(backbone), time.perf_counter()
    engine.ensure(texts)
    encoded = time.perf_counter()
    if "chunk reuse, fused" in args.systems:
        known = set(texts)
        engine.fuse_in_order([[p.chunk for p in item.passages if p.chunk in known] for item in earlier], method="auto")
    print(f"passages encoded in {encoded - start:.0f} s, fused in {time.perf_counter() - encoded:.0f} s", flush=True)
    ask(engine, prompts[:1], "full", 1, 2)  # warms up
    draw = random.Random(0)
    for users in args.users:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems}
        for _ in range(args.rounds):
            for name in draw.sample(args.systems, len(args.systems)):
                mine = Engine(backbone, method=SYSTEMS[name]) if name in FRESH else engine
                measured = ask(mine, prompts, SYSTEMS[name], users, args.tokens)
                results[name].append(measured)
                if args.out:
                    row = {"model": args.model, "threads": torch.get_num_threads(), "users": users, "system": name}
                    with args.out.open("a") as file:
                        file.write(json.dumps({**row, **measured}) + "\n")
        print(f"\n{users} user{'s' * (users > 1)}\n")
        print(*table(asked, results, sum(lengths)), sep="\n", flush=True)


if __name__ == "__main__":
    main()
