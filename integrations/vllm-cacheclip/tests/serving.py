"""vLLM with the connector in this process, over tiny random models or real ones; used by all tests of this folder."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from cacheclip_vllm.encoding import encode_request
from cacheclip_vllm.plan import FIELD
from cacheclip_vllm.served import ServedModel
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))
from tiny import PASSAGES, QUESTION, SHAPE, byte_tokenizer

from cacheclip_rag.methods import Method

__all__ = ["PASSAGES", "QUESTION", "Served", "save_tiny"]

SHAPE_HERE = {**SHAPE, "head_dim": 32, "hidden_size": 128}
"""vLLM's attention on CPUs wants heads of 32 or more."""

KINDS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHAPE_HERE),
    "qwen2": lambda: Qwen2Config(**SHAPE_HERE),
    "qwen3": lambda: Qwen3Config(**SHAPE_HERE),
    "sliding": lambda: MistralConfig(**SHAPE_HERE, sliding_window=48),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE_HERE,
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
}


def save_tiny(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A random model of four layers with a byte tokenizer, saved to ``folder``."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(KINDS[kind]()).float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


class Served:
    """An `LLM` with the connector, or without it (``reuse=False``)."""

    def __init__(self, model: Path | str, store: Path | None, *, dtype: str = "float32", **options: Any) -> None:
        connector, extra = {}, options.pop("extra", {})
        if store is not None:
            connector = dict(
                worker_cls="cacheclip_vllm.worker.Worker",
                kv_transfer_config=KVTransferConfig(
                    kv_connector="CacheClipConnector",
                    kv_connector_module_path="cacheclip_vllm.connector",
                    kv_role="kv_both",
                    kv_load_failure_policy="recompute",
                    kv_connector_extra_config={"store": str(store), **extra},
                ),
            )
        options = {
            "max_model_len": 2048,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 1 << 28,
            "enable_prefix_caching": True,
            "seed": 0,
            "disable_log_stats": False,
            "max_logprobs": -1,
            **connector,
            **options,
        }
        self.store = store
        self.llm = LLM(str(model), dtype=dtype, **options)
        self.model = ServedModel(self.llm.llm_engine.vllm_config)

    def encode(self, texts: list[str], method: Method | str = "auto", **options: Any) -> None:
        """Compute and store these chunks."""
        requests = [encode_request(self.model, method, text, **options) for text in texts]
        self._generate(
            [ids for ids, _ in requests],
            [
                SamplingParams(max_tokens=1, temperature=0, extra_args={"kv_transfer_params": params})
                for _, params in requests
            ],
        )

    def prompt(self, passages: list[str], question: str = QUESTION, head: str = "", **more: Any) -> list[int]:
        """The token ids of a chat prompt with these passages."""
        content = head + "\n\n".join(passages) + f"\n\n{question}"
        text = self.model.chat([{"role": "user", "content": content}])
        return self.model.tokenise_prompt(text, **more).ids.tolist()

    def ask(self, prompts: list[list[int]], tokens: int = 12, **options: Any) -> list[tuple[list[int], dict[str, Any]]]:
        """Greedy answers' token ids, and the reports, of requests at once; ``options`` are the connector's."""
        return self.ask_each([(ids, options) for ids in prompts], tokens)

    def ask_each(
        self, jobs: list[tuple[list[int], dict[str, Any]]], tokens: int = 12, **sampling: Any
    ) -> list[tuple[list[int], dict[str, Any]]]:
        """As `ask`, each prompt with options of its own."""
        params = [asking(options, max_tokens=tokens, **sampling) for _, options in jobs]
        return self._generate([ids for ids, _ in jobs], params)

    def cached(self, prompts: list[list[int]], **options: Any) -> list[int]:
        """How many tokens of each prompt vLLM's own prefix cache had."""
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(requests, asking(options, max_tokens=1), use_tqdm=False)
        return [output.num_cached_tokens for output in outputs]

    def first_token(self, ids: list[int], **options: Any) -> torch.Tensor:
        """The log probabilities ``[V]`` of an answer's first token."""
        params = asking(options, max_tokens=2, logprobs=-1)
        [output] = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        logprobs = output.outputs[0].logprobs[0]
        return torch.tensor([logprobs[token].logprob for token in range(len(logprobs))])

    @property
    def block(self) -> int:
        """Tokens of a block of the KV cache."""
        return self.llm.llm_engine.vllm_config.cache_config.block_size

    def connectors(self) -> tuple[Any, Any]:
        """The connector's half in the scheduler, and the one in the worker, both of which are in this process."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return self.llm.llm_engine.engine_core.engine_core.scheduler.connector, get_kv_transfer_group()

    def preemptions(self) -> int:
        """How often a running request was preempted."""
        return sum(metric.value for metric in self.llm.get_metrics() if metric.name == "vllm:num_preemptions")

    def close(self) -> None:
        """Free the model and its KV cache, so that another one can be opened in this process."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[tuple[list[int], dict]]:
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [
            (list(output.outputs[0].token_ids), (output.kv_transfer_params or {}).get(FIELD, {})) for output in outputs
        ]


def asking(options: dict[str, Any], **sampling: Any) -> SamplingParams:
    """Greedy sampling with the connector's ``options``, and a report."""
    extra = {"kv_transfer_params": {FIELD: {"report": True, "sources": True, **options}}}
    return SamplingParams(temperature=0, ignore_eos=True, extra_args=extra, **sampling)
