"""vLLM's CPU build in this process, with its prefix cache on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the worker has chosen the cores

from asked import Asked, by_steps
from vllm import LLM, SamplingParams


def load(model: str, options: dict[str, Any], threads: int) -> Any:
    settings = {
        "enable_prefix_caching": True,
        "max_model_len": 8192,
        "kv_cache_memory_bytes": 2 << 30,
        "max_num_seqs": 16,
        "seed": 0,
    }
    return LLM(model, **{**settings, **options})


def ingest(system: Any, passages: list[str]) -> None:
    pass


def ask(system: Any, prompts: list[str], users: int, tokens: int) -> list[Asked]:
    engine = system.llm_engine
    greedy = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens)

    def add(number: int, prompt: str) -> None:
        engine.add_request(str(number), {"prompt": prompt}, greedy.clone())

    def step() -> Iterable[tuple[int, int, str | None]]:
        for output in engine.step():
            answer = output.outputs[0]
            yield int(output.request_id), len(answer.token_ids), answer.text if output.finished else None

    return by_steps(prompts, users, add, step)
