"""Prometheus: counters and one histogram."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigurationError
from ..report import Report

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Prometheus:
    """Counts requests in a registry, by default the process's own; ``prometheus_client.start_http_server`` serves it.

    | metric | labels |
    |---|---|
    | ``cacheclip_requests_total`` | ``method``, ``finish_reason`` |
    | ``cacheclip_prompt_tokens_total`` | ``fate``: ``prefix`` or ``reused`` (from cache), ``recomputed``, ``fresh`` |
    | ``cacheclip_completion_tokens_total`` | |
    | ``cacheclip_fallbacks_total`` | ``kind``: ``chunk``, ``full prefill``, ``plain prefill`` |
    | ``cacheclip_time_to_first_token_seconds`` | ``method`` |

    One object may observe several engines.
    """

    def __init__(self, registry: Any = None) -> None:
        """Raises `ConfigurationError` without prometheus-client, ValueError for a second one in a registry."""
        try:
            from prometheus_client import REGISTRY, Counter, Histogram
        except ImportError as error:
            raise ConfigurationError(
                "metrics need prometheus-client: pip install 'cacheclip-rag[prometheus]'"
            ) from error
        place = {"registry": REGISTRY if registry is None else registry}
        self._requests = Counter(
            "cacheclip_requests", "Requests that have ended.", ["method", "finish_reason"], **place
        )
        self._prompt = Counter("cacheclip_prompt_tokens", "Prompt tokens by what became of them.", ["fate"], **place)
        self._completion = Counter("cacheclip_completion_tokens", "Tokens of answers.", **place)
        self._fallbacks = Counter("cacheclip_fallbacks", "Times that reuse was given up.", ["kind"], **place)
        self._first_token = Histogram(
            "cacheclip_time_to_first_token_seconds",
            "Seconds from the call to the first token.",
            ["method"],
            buckets=SECONDS,
            **place,
        )

    def __call__(self, report: Report) -> None:
        self._requests.labels(report.method, report.finish_reason).inc()
        for fate in ("prefix", "reused", "recomputed", "fresh"):
            self._prompt.labels(fate).inc(getattr(report, fate))
        self._completion.inc(report.completion_tokens)
        for reason in report.fallbacks:
            kind = reason.partition(":")[0]
            self._fallbacks.labels("chunk" if kind.startswith("chunk ") else kind).inc()
        if report.completion_tokens:
            self._first_token.labels(report.method).observe(report.ttft)
