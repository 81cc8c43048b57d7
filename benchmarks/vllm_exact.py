"""Whether reuse inside vLLM does what it does in the library, and at ratio 1 what vLLM does, on real prompts (float32).

    .venv-vllm/bin/python benchmarks/vllm_exact.py DATA --model smollm2-135m-instruct --questions 20

Three comparisons of greedy answers, with vLLM's prefix cache on: ratio 1 with plain vLLM; one passage behind its prefix
at ratio 0 with plain vLLM; ``auto`` with the library's engine over chunks that transformers encoded: the rows that are
recomputed, the answer's tokens, and the KL of the first token's distribution.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / part) for part in ("tools", "integrations/vllm-cacheclip/tests", "tests")]

import torch
from cacheclip_eval.data import INSTRUCTION, Item, read, spread
from serving import Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheclip_rag import Engine
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.weights.pull import resolve


def content(item: Item, passages: list[str]) -> str:
    return "\n\n".join([*passages, INSTRUCTION, f"Question: {item.question}"])


def recomputed(runs: Any) -> list[int]:
    rows, at = list[int](), 0
    for source, count in runs:
        rows += range(at, at + count) if source == "recomputed" else []
        at += count
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    given = parser.parse_args()
    folder = resolve(given.model)
    items = spread(read(given.data / "qa.jsonl"), given.questions)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(Backbone(model, AutoTokenizer.from_pretrained(folder)))
    with tempfile.TemporaryDirectory() as store:
        served = Served(
            folder, Path(store), max_model_len=4096, max_num_batched_tokens=4096, kv_cache_memory_bytes=2 << 30
        )
        same = {"ratio 1": 0, "one passage": 0, "auto, rows": 0, "auto, tokens": 0}
        divergence = list[float]()
        for item in items:
            passages = [passage.chunk for passage in item.passages[: given.passages]]
            served.encode(passages)
            engine.ensure(passages)
            chat = engine.backbone.chat([{"role": "user", "content": content(item, passages)}])
            ids = served.model.tokenise_prompt(chat).ids.tolist()
            [(plain, _)] = served.ask([ids], given.tokens, reuse=False)
            same["ratio 1"] += served.ask([ids], given.tokens, recompute_ratio=1.0)[0][0] == plain
            alone = served.model.chat([{"role": "user", "content": content(item, passages[:1])}])
            one = served.model.tokenise_prompt(alone).ids.tolist()
            [(expected, _)] = served.ask([one], given.tokens, reuse=False)
            same["one passage"] += served.ask([one], given.tokens, method="naive")[0][0] == expected
            [(answer, report)] = served.ask([ids], given.tokens)
            library = engine.generate(chat, max_new_tokens=given.tokens, temperature=0)
            assert library.report.token_sources is not None
            runs = [(run.source.name.lower(), run.tokens) for run in library.report.token_sources.runs()]
            same["auto, rows"] += recomputed(report["sources"]) == recomputed(runs)
            same["auto, tokens"] += answer[: len(library.ids)] == list(library.ids)
            logits = engine.prefill(chat).logits[0].log_softmax(dim=-1)
            got = served.first_token(ids)
            divergence.append(float((logits.exp() * (logits - got)).sum()))
    print(f"\n{given.model}, float32, {len(items)} questions, {given.passages} passages")
    for name, count in same.items():
        print(f"{name}: {count} of {len(items)} the same")
    print(f"auto, first token: KL at most {max(divergence):.1e}")


if __name__ == "__main__":
    main()
