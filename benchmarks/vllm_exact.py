"""Whether reuse inside vLLM does what it does in the library, and at ratio 1 what vLLM does, on real prompts (float32).

    .venv-vllm/bin/python benchmarks/vllm_exact.py DATA --model qwen2.5-coder-0.5b-instruct --questions 20

Comparisons of greedy answers, with vLLM's prefix cache on: ratio 1 with plain vLLM; one passage behind its prefix at
ratio 0 with plain vLLM; ``auto`` with the library's engine over chunks that transformers encoded: the rows that are
recomputed, the answer's tokens, and the KL of the first token's distribution. With ``--auxiliary``, the rows and tokens
of ``cacheclip`` as well. ``--results FILE`` keeps each question's result, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
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


class Comparison:
    """vLLM with reuse, and the library's engine, over the same weights."""

    def __init__(self, folder: Path, store: Path, auxiliary: Path | None) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.engine = Engine(Backbone(model, AutoTokenizer.from_pretrained(folder)), method="auto", auxiliary=auxiliary)
        self.methods = ["auto"] if auxiliary is None else ["auto", "cacheclip"]
        self.served = Served(
            folder,
            store,
            max_model_len=4096,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=1 << 29,
            extra={"method": "auto", "auxiliary": None if auxiliary is None else str(auxiliary)},
        )

    def of(self, item: Item, passages: list[str], tokens: int) -> dict[str, Any]:
        """Which answers to one question are the same, and the KL."""
        served, engine = self.served, self.engine
        served.encode(passages)
        engine.ensure(passages)
        chat = engine.backbone.chat([{"role": "user", "content": content(item, passages)}])
        ids = served.model.tokenise_prompt(chat).ids.tolist()
        [(plain, _)] = served.ask([ids], tokens, reuse=False)
        same = {"ratio 1": served.ask([ids], tokens, recompute_ratio=1.0)[0][0] == plain}
        alone = served.model.chat([{"role": "user", "content": content(item, passages[:1])}])
        one = served.model.tokenise_prompt(alone).ids.tolist()
        [(expected, _)] = served.ask([one], tokens, reuse=False)
        same["one passage"] = served.ask([one], tokens, method="naive")[0][0] == expected
        for method in self.methods:
            [(answer, report)] = served.ask([ids], tokens, method=method)
            library = engine.generate(chat, method=method, max_new_tokens=tokens, temperature=0)
            assert library.report.token_sources is not None
            runs = [(run.source.name.lower(), run.tokens) for run in library.report.token_sources.runs()]
            same[f"{method}, rows"] = recomputed(report["sources"]) == recomputed(runs)
            same[f"{method}, tokens"] = answer[: len(library.ids)] == list(library.ids)
        logits = engine.prefill(chat).logits[0].log_softmax(dim=-1)
        return {**same, "KL": float((logits.exp() * (logits - served.first_token(ids))).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--auxiliary")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no question after as many")
    given = parser.parse_args()
    begun, items = time.monotonic(), spread(read(given.data / "qa.jsonl"), given.questions)
    done: list[dict[str, Any]] = []
    if given.results is not None and given.results.exists():
        done = [json.loads(line) for line in given.results.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as store:
        if len(done) < len(items):
            auxiliary = None if given.auxiliary is None else resolve(given.auxiliary)
            comparison = Comparison(resolve(given.model), Path(store), auxiliary)
        for item in items[len(done) :]:
            if time.monotonic() - begun > given.seconds:
                break
            done.append(comparison.of(item, [one.chunk for one in item.passages[: given.passages]], given.tokens))
            if given.results is not None:
                with given.results.open("a") as results:
                    results.write(json.dumps(done[-1]) + "\n")
    print(f"\n{given.model}, float32, {len(done)} of {len(items)} questions, {given.passages} passages")
    for name in done[0] if done else ():
        if name != "KL":
            print(f"{name}: {sum(one[name] for one in done)} of {len(done)} the same")
    print(f"auto, first token: KL at most {max((one['KL'] for one in done), default=0):.1e}")


if __name__ == "__main__":
    main()
