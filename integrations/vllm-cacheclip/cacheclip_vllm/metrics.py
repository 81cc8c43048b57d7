"""What reuse did, counted for vLLM's ``/metrics`` and its log: tokens by source, requests, fallbacks by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from .plan import Done

TOKENS, REQUESTS, FALLBACKS = "prompt_tokens", "requests", "fallbacks"

_METRICS = {
    TOKENS: ("source", "Prompt tokens of requests with reuse, by the source of their KV."),
    REQUESTS: ("reuse", "Requests by what came of reuse: yes, unknown (no chunk of theirs), unwanted, fallback."),
    FALLBACKS: ("kind", "How often reuse was given up, for a chunk or a request."),
}
"""Of each metric: its label, and what it counts. "vllm:" in front, since vLLM looks after its own names only."""

_UNKNOWN, _UNWANTED = "no chunk in this prompt", "not wanted"
_KINDS = (
    ("chunk", ("not encoded as", "its stored KV is gone")),
    ("loading", ("takes longer than computing it",)),
    ("size", ("rows would have to be computed", "would take longer")),
    ("request", ("a pooling request", "prompt embeddings", "a multimodal", "LoRA", "prompt_logprobs", "streaming")),
)
"""Kinds of fallbacks by what their sentences hold. All others come from a request's options, or are a failure."""


def kind_of(reason: str) -> str:
    """The label of a fallback before anything failed: few values, whatever numbers and names its sentence has."""
    return next((kind for kind, parts in _KINDS if any(part in reason for part in parts)), "options")


class ReuseStats(KVConnectorStats):
    """Counts since the last step that had an output, kept by the scheduler: metric, then label, then number."""

    def count(self, metric: str, label: str, number: int = 1) -> None:
        of = self.data.setdefault(metric, {})
        of[label] = of.get(label, 0) + number

    def done(self, done: Done) -> None:
        """A worker has filled a request's blocks, or failed to. Encoded chunks are not counted."""
        if done.failed:
            self.count(REQUESTS, "fallback")
            self.count(FALLBACKS, "failure")
        elif "tokens" in done.report:
            self.count(REQUESTS, "yes")
            for source, number in done.report["tokens"].items():
                self.count(TOKENS, source, number)
            for reason in done.report["fallbacks"]:
                self.count(FALLBACKS, kind_of(reason))

    def left(self, reason: str) -> None:
        """A request was left to vLLM."""
        if reason.startswith(_UNWANTED):
            self.count(REQUESTS, "unwanted")
        elif reason.startswith(_UNKNOWN):
            self.count(REQUESTS, "unknown")
        else:
            self.count(REQUESTS, "fallback")
            self.count(FALLBACKS, kind_of(reason))

    def reset(self) -> None:
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for metric, values in other.data.items():
            for label, number in values.items():
                self.count(metric, label, number)
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the line that vLLM logs every few seconds."""
        return {f"{label} {metric}": number for metric, values in self.data.items() for label, number in values.items()}

    def is_empty(self) -> bool:
        return not self.data


class ReuseMetrics(KVConnectorPromMetrics):
    """Counters of each engine in vLLM's registry: ``vllm:cacheclip_prompt_tokens_total{source=}`` and the like."""

    def __init__(self, vllm_config: Any, types: Any, labels: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, types, labels, values)
        self._counters = {
            metric: self._counter_cls(f"vllm:cacheclip_{metric}", about, labelnames=[*labels, label])
            for metric, (label, about) in _METRICS.items()
        }

    def observe(self, transfer_stats_data: Mapping[str, Mapping[str, int]], engine_idx: int = 0) -> None:
        for metric, values in transfer_stats_data.items():
            for label, number in values.items():
                self._counters[metric].labels(*self.per_engine_labelvalues[engine_idx], label).inc(number)
