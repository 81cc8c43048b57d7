"""Time to first token and throughput of vLLM with reuse, against vLLM itself with its prefix cache on.

    .venv-vllm/bin/python benchmarks/vllm_serving.py DATA --model qwen2.5-coder-0.5b-instruct --questions 12

Runs in the environment that `integrations/vllm-cacheclip/run_tests` makes. ``DATA`` is a folder with ``qa.jsonl``;
every system answers the same questions in one process, each from an empty prefix cache, in shuffled rounds.
``reordered`` is vLLM with each prompt's passages sorted by how many prompts they are in, so that more beginnings are
shared (the idea of ContextPilot, arXiv 2511.03475). ``fused`` takes variants computed behind the passages of the same
prompt in another order, as after an earlier prompt with them. Ratios are medians over questions; F1 stands beside them.

``--context TOKENS`` fills prompts up with passages of ``corpus.jsonl``. A long measurement can be taken in parts:
``--folder`` keeps what was encoded and measured, ``--seconds`` ends a part, and the same command goes on. The runs of
one round, which are compared with each other, then may come from two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
sys.path[:0] = [
    str(Path(__file__).parents[1] / part) for part in ("tools", "integrations/vllm-cacheclip/tests", "tests")
]

from cacheclip_eval.data import INSTRUCTION, Item, passages, read, spread
from cacheclip_eval.metrics import f1
from cacheclip_vllm.libraries import Libraries, StoreOptions
from serving import Served, asking

from cacheclip_rag import methods
from cacheclip_rag.chunks import canonical
from cacheclip_rag.weights.pull import resolve

SYSTEMS: dict[str, dict[str, Any]] = {
    "vLLM": {"reuse": False},
    "reordered": {"reuse": False},
    "reuse, r = 0.1": {"method": "auto:fused=False", "recompute_ratio": 0.1},
    "reuse, r = 0.2": {"method": "auto:fused=False", "recompute_ratio": 0.2},
    "auto, fused": {"method": "auto"},
}


def contexts_of(served: Served, items: list[Item], data: Path, most: int, tokens: int | None) -> list[list[str]]:
    """Each question's passages; with ``tokens`` filled up with others, in any order, until they have as many."""
    chosen = [[passage.chunk for passage in item.passages[:most]] for item in items]
    if tokens is None:
        return chosen
    others = passages(data / "corpus.jsonl")
    lengths = {text: len(served.model.tokenise(text, plain=True)) for text in {*others, *chain(*chosen)}}
    for number, texts in enumerate(chosen):
        chance = random.Random(number)
        for other in chance.sample(others, len(others)):
            if sum(lengths[text] for text in texts) + lengths[other] // 2 >= tokens:
                break
            if other not in texts:
                texts.append(other)
        chance.shuffle(texts)
    return chosen


def prompts_of(served: Served, items: list[Item], chosen: list[list[str]]) -> dict[str, list[list[int]]]:
    """Each question's token ids, as they are and reordered."""
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


def prepare(served: Served, chosen: list[list[str]], deadline: float) -> bool:
    """Encode all passages, and fuse each behind those of its prompt in another order; whether there was the time."""
    library = Libraries(served.model, StoreOptions(str(served.store)), in_memory=False).of(
        "", methods.resolve("auto").encode
    )
    start, chance = time.process_time(), random.Random(0)
    jobs: list[tuple[str, list[str]]] = [(text, []) for text in dict.fromkeys(chain(*chosen))]
    for texts in chosen:
        order = chance.sample(texts, len(texts))
        jobs += [(text, order[:number]) for number, text in enumerate(order) if number]
    missing = [
        (text, context)
        for text, context in jobs
        if library.key(canonical(text), [canonical(other) for other in context]) not in library.store
    ]
    for number, (text, context) in enumerate(missing):
        if time.monotonic() > deadline:
            print(f"{len(missing) - number} of {len(jobs)} chunks are still to be encoded")
            return False
        served.encode([text], context=context)
    print(f"{len(missing)} of {len(jobs)} chunks encoded in {time.process_time() - start:.0f} CPU seconds\n")
    return True


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
        slow = first[min(len(first) - 1, int(0.95 * len(first)))]
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
    parser.add_argument("--context", type=int, metavar="TOKENS", help="fill prompts up to as many")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--folder", type=Path, help="keep what was encoded and measured here")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after as many")
    given = parser.parse_args()
    deadline = time.monotonic() + given.seconds
    items = spread(read(given.data / "qa.jsonl"), given.questions)
    with tempfile.TemporaryDirectory() as scratch:
        measure(given, items, given.folder or Path(scratch), deadline)


def measure(given: argparse.Namespace, items: list[Item], folder: Path, deadline: float) -> None:
    setting = {name: vars(given)[name] for name in ("model", "dtype", "questions", "passages", "context", "tokens")}
    file, done = folder / "runs.jsonl", dict[str, dict[str, Any]]()
    if file.exists():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        if any(line["setting"] != setting for line in lines):
            raise SystemExit(f"{folder} holds runs with other options: take another folder")
        done = {line["run"]: line for line in lines}
    served = Served(
        resolve(given.model),
        folder / "store",
        dtype=given.dtype,
        max_model_len=8192,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=3 << 30,
    )
    chosen = contexts_of(served, items, given.data, given.passages, given.context)
    if not prepare(served, chosen, deadline):
        return
    prompts = prompts_of(served, items, chosen)
    counts, lengths = [len(texts) for texts in chosen], [len(ids) for ids in prompts["as they are"]]
    print(
        f"{given.model}, {given.dtype}, {median(counts):.0f} passages, {median(lengths):.0f} tokens a prompt (median)\n"
    )
    chance = random.Random(0)
    for name in given.systems:  # what a first run costs is no system's
        if f"{given.clients[0]}/0/{name}" not in done:
            run(served, prompts["as they are"][:1], SYSTEMS[name], 1, 2)
    for clients in given.clients:
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in given.systems}
        for number in range(given.rounds):
            for name in chance.sample(given.systems, len(given.systems)):
                key = f"{clients}/{number}/{name}"
                if key not in done:
                    if time.monotonic() > deadline:
                        print(f"stopped with {len(done)} runs: the same command goes on")
                        return
                    mine = prompts["reordered" if name == "reordered" else "as they are"]
                    done[key] = run(served, mine, SYSTEMS[name], clients, given.tokens)
                    with file.open("a") as lines:
                        lines.write(json.dumps({"run": key, "setting": setting, **done[key]}) + "\n")
                results[name].append(done[key])
        print(f"{clients} client{'s' if clients > 1 else ''}\n")
        table(served, items, results, given.rounds)


if __name__ == "__main__":
    main()
