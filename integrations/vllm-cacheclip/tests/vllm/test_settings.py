"""The same checks under vLLM's settings, each in a process of its own (see setting.py)."""

from __future__ import annotations

from typing import Any

import pytest
from setting import in_another_process

SETTINGS: dict[str, dict[str, Any]] = {
    "qwen2": {"kind": "qwen2"},
    "qwen3, norms on queries and keys": {"kind": "qwen3"},
    "gemma3, sliding and full layers": {"kind": "gemma3"},
    "bfloat16": {"dtype": "bfloat16"},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunked prefill": {"max_num_batched_tokens": 1300, "long_prefill_token_threshold": 96},
    "speculative decoding by n-grams": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
    "a method with parameters": {"method": "auto:prefix=none"},
    "fp8 KV cache": {"kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return in_another_process()


def check(result: dict[str, Any]) -> None:
    assert not result["fallbacks"]
    assert all(result["whole"]) and all(result["single"]) and all(result["together"])
    assert result["plain"] == result["again"]
    assert result["reused"]


def test_the_connector_changes_nothing_where_it_does_nothing(default: dict[str, Any]) -> None:
    """The oracle of all other tests: an engine without it gives the plain answers."""
    assert in_another_process(reuse=False)["plain"] == default["plain"]


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name: str) -> None:
    check(in_another_process(**SETTINGS[name]))


def test_two_ranks_answer_as_one(default: dict[str, Any]) -> None:
    """Tensor parallelism: each rank stores and places its heads, and all choose the same rows."""
    result = in_another_process(tensor_parallel_size=2, environment={"VLLM_CPU_OMP_THREADS_BIND": "nobind"})
    check(result)
    assert result["auto"] == default["auto"]


def test_engine_core_in_a_process_of_its_own(default: dict[str, Any]) -> None:
    result = in_another_process(environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    check(result)
    assert result["auto"] == default["auto"]


def test_preempted_requests_answer_as_others() -> None:
    """With a KV cache of ten requests' prompts and no more, running requests are preempted and filled again."""
    result = in_another_process(tokens=150, kv_cache_memory_bytes=10 << 20)
    check(result)
    assert result["preemptions"]


def test_a_beginning_that_is_computed_at_the_same_time() -> None:
    """Its blocks count as cached as soon as they are scheduled, and nothing may be filled over them before they are."""
    result = in_another_process(what="meeting", long_prefill_token_threshold=160)
    assert all(result["same"]) and not result["fallbacks"]


def test_layers_that_all_slide_are_served_without_reuse() -> None:
    """vLLM gives rows outside the last window no block of their own."""
    with pytest.raises(RuntimeError, match="not one group of full attention"):
        in_another_process(kind="sliding")
    result = in_another_process(kind="sliding", extra={"unsupported": "plain"})
    assert not result["reused"] and all(result["whole"]) and all(result["together"])
