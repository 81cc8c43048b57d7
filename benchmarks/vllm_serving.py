"""Time to first token and throughput of vLLM with reuse, against vLLM itself with its prefix cache on.

    .venv-vllm/bin/python benchmarks/vllm_serving.py DATA --model qwen2.5-coder-0.5b-instruct --questions 12

Runs in the environment that `integrations/vllm-cacheclip/run_tests` makes. ``DATA`` is a folder with ``qa.jsonl``;
every system answers the same questions in one process, each from an empty prefix cache, in shuffled rounds.
``reordered`` is vLLM with each prompt's passages sorted by how many prompts they are in, so that more beginnings are
shared (the idea of ContextPilot, arXiv 2511.03475). ``fused`` takes variants computed behind the passages of the same
prompt in another order, as after an earlier prompt with them. Ratios are medians over questions; F1 stands beside them.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path[:0] = [
    str(Path(__file__).parents[1] / part) for part in ("tools", "integrations/vllm-cacheclip/tests", "tests")
]

from cacheclip_eval.data import INSTRUCTION, Item, read, spread
from cacheclip_eval.metrics import f1
from serving import Served, asking

from cacheclip_rag.weights.pull import resolve

SYSTEMS: dict[str, dict[str, Any]] = {
    "vLLM": {"reuse": False},
    "reordered": {"reuse": False},
    "reuse, r = 0.1": {"method": "auto:fused=False", "recompute_ratio": 0.1},
    "reuse, r = 0.2": {"method": "auto:fused=False", "recompute_ratio": 0.2},
    "auto, fused": {"method": "auto"},
}


def prompts_of(served: Served, items: list[Item], passages: int) -> dict[str, list[list[int]]]:
    """Each question's token ids, as they are and reordered."""
    chosen = [[passage.chunk for passage in item.passages[:passages]] for item in items]
    often = Counter(text for texts in chosen for text in texts)
    orders = {
        "as they are": chosen,
        "reordered": [sorted(texts, key=lambda text: (-often[text], text)) for texts in chosen],
    }
    made: dict[str, list[list[int]]] = {}
    for name, contexts in orders.items():
        texts = [
            "\n\n".join([INSTRUCTION, *context, f"Question: {item.question}"])
            for context, item in zip(contexts, items, strict=True)
        ]
        chats = [served.model.chat([{"role": "user", "content": text}]) for text in texts]
        made[name] = [served.model.tokenise_prompt(chat).ids.tolist() for chat in chats]
    return made


def run(served: Served, prompts: list[list[int]], options: dict[str, Any], clients: int, tokens: int) -> dict[str, Any]:
    """Seconds to each first token and in all, with ``clients`` that each ask one question after another."""
    assert served.llm.reset_prefix_cache()
    engine = served.llm.llm_engine
    waiting, begun = list(range(len(prompts)))[::-1], dict[str, float]()
    first, answers = [0.0] * len(prompts), [list[int]()] * len(prompts)
    start = time.perf_counter()

    def ask() -> None:
        number = waiting.pop()
        params = asking(options, max_tokens=tokens)
        params.ignore_eos = False
        engine.add_request(str(number), {"prompt_token_ids": prompts[number]}, params)
        begun[str(number)] = time.perf_counter()

    for _ in range(min(clients, len(prompts))):
        ask()
    while engine.has_unfinished_requests():
        for output in engine.step():
            number = int(output.request_id)
            if not first[number]:
                first[number] = time.perf_counter() - begun[output.request_id]
            if output.finished:
                answers[number] = list(output.outputs[0].token_ids)
                if waiting:
                    ask()
    return {"first": first, "seconds": time.perf_counter() - start, "answers": answers}


def prepare(served: Served, items: list[Item], passages: int) -> None:
    """Encode all passages, and fuse each behind those of its prompt in another order."""
    chosen = [[passage.chunk for passage in item.passages[:passages]] for item in items]
    start = time.process_time()
    texts = list(dict.fromkeys(text for texts in chosen for text in texts))
    served.encode(texts)
    print(f"{len(texts)} passages encoded in {time.process_time() - start:.0f} CPU seconds")
    start, chance = time.process_time(), random.Random(0)
    for texts in chosen:
        order = chance.sample(texts, len(texts))
        for number, text in enumerate(order):
            if number:
                served.encode([text], context=order[:number])
    print(f"fused in {time.process_time() - start:.0f} CPU seconds\n")


def table(served: Served, items: list[Item], results: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    print("| | first token, median | against vLLM | p95 | requests a second | against vLLM | F1 |")
    print("|---|---|---|---|---|---|---|")
    base = results["vLLM"]
    for name, runs in results.items():
        first = sorted(value for one in runs for value in one["first"])
        ratios = [
            a / b
            for mine, plain in zip(runs, base, strict=True)
            for a, b in zip(plain["first"], mine["first"], strict=True)
        ]
        rate = median(len(items) / one["seconds"] for one in runs)
        gain = median(plain["seconds"] / mine["seconds"] for mine, plain in zip(runs, base, strict=True))
        texts = [served.model.tokenizer.decode(ids, skip_special_tokens=True) for ids in runs[0]["answers"]]
        score = sum(f1(text, item.answers) for text, item in zip(texts, items, strict=True)) / len(items)
        slow = first[int(0.95 * (len(first) - 1))]
        cells = f"{median(first):.2f} s", f"{median(ratios):.1f}x", f"{slow:.2f} s", f"{rate:.2f}", f"{gain:.1f}x"
        print(f"| {name} | {' | '.join(cells)} | {score:.3f} |")
    print(f"\n{rounds} rounds of {len(items)} questions\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--questions", type=int, default=12)
    parser.add_argument("--passages", type=int, default=10)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    given = parser.parse_args()
    items = spread(read(given.data / "qa.jsonl"), given.questions)
    with tempfile.TemporaryDirectory() as store:
        served = Served(
            resolve(given.model),
            Path(store),
            dtype=given.dtype,
            max_model_len=8192,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=3 << 30,
        )
        prepare(served, items, given.passages)
        prompts = prompts_of(served, items, given.passages)
        lengths = [len(ids) for ids in prompts["as they are"]]
        print(
            f"{given.model}, {given.dtype}, {given.passages} passages, {median(lengths):.0f} tokens a prompt (median)\n"
        )
        chance = random.Random(0)
        for clients in given.clients:
            results: dict[str, list[dict[str, Any]]] = {name: [] for name in given.systems}
            for _ in range(given.rounds):
                for name in chance.sample(given.systems, len(given.systems)):
                    mine = prompts["reordered" if name == "reordered" else "as they are"]
                    results[name].append(run(served, mine, SYSTEMS[name], clients, given.tokens))
            print(f"{clients} client{'s' if clients > 1 else ''}\n")
            table(served, items, results, given.rounds)


if __name__ == "__main__":
    main()
