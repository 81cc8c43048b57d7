"""Prometheus: a collector that reads `Engine.stats` at each scrape."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any
from weakref import WeakSet

from ..engine import Engine
from ..errors import ConfigurationError
from ..serving.stats import KLS, SECONDS, AuditStats, Stats, total

_BOUNDS = [*map(str, SECONDS), "+Inf"]


class Prometheus:
    """A collector of an engine's counts, registered with ``registry`` (default: the global one), which
    ``prometheus_client.start_http_server`` serves.

    | metric | labels |
    |---|---|
    | ``cacheclip_requests_total`` | ``method``, ``finish_reason`` |
    | ``cacheclip_in_flight``, ``cacheclip_waiting`` (requests) | |
    | ``cacheclip_prompt_tokens_total`` | ``fate``: ``prefix`` or ``reused`` (cached), ``recomputed``, ``fresh`` |
    | ``cacheclip_completion_tokens_total`` | |
    | ``cacheclip_fallbacks_total`` | ``kind``: ``chunk``, ``full prefill``, ``plain prefill``, ``escaped documents`` |
    | ``cacheclip_time_to_first_token_seconds`` | ``method`` |
    | ``cacheclip_audits_total`` | ``outcome``: ``same``, ``changed``, ``dropped``, ``forgotten``, ``failed`` |
    | ``cacheclip_audit_kl`` (nats, first token) | |
    | ``cacheclip_store_lookups_total`` | ``result``: ``hit``, ``miss`` |
    | ``cacheclip_store_chunks`` | ``kind``: ``alone``, ``fused`` |
    | ``cacheclip_store_bytes`` | ``tier``: ``memory``, ``disk`` |

    Several engines are summed up. It holds weak references only.
    """

    def __init__(self, *engines: Engine, registry: Any = None) -> None:
        """Raises `ConfigurationError` without prometheus-client or without an engine, ValueError for a second collector
        in one registry.
        """
        try:
            from prometheus_client import REGISTRY
        except ImportError as error:
            raise ConfigurationError(
                "metrics need prometheus-client: pip install 'cacheclip-rag[prometheus]'"
            ) from error
        if not engines:
            raise ConfigurationError("metrics need an engine to read from: Prometheus(engine)")
        self._engines = WeakSet(engines)
        (REGISTRY if registry is None else registry).register(self)

    def describe(self) -> Iterator[Any]:
        """The metrics by name; called by the registry, which refuses duplicate names."""
        return self.collect()

    def collect(self) -> Iterator[Any]:
        """The current metrics; called by the registry at each scrape."""
        from prometheus_client.core import CounterMetricFamily as Counter
        from prometheus_client.core import GaugeMetricFamily as Gauge
        from prometheus_client.core import HistogramMetricFamily as Histogram

        every = [engine.stats() for engine in self._engines]
        store = total(stats.store for stats in every)

        def whole(name: str) -> float:
            return sum(getattr(stats, name) for stats in every)

        def one(kind: Any, name: str, about: str) -> Any:
            return kind(f"cacheclip_{name}", about, value=whole(name))

        def several(kind: Any, name: str, about: str, label: str, values: Mapping[str, float]) -> Any:
            family = kind(f"cacheclip_{name}", about, labels=[label])
            for key, value in values.items():
                family.add_metric([key], value)
            return family

        requests = Counter("cacheclip_requests", "Requests that have ended.", labels=["method", "finish_reason"])
        for labels, value in _ended(every).items():
            requests.add_metric(labels, value)
        yield requests
        yield one(Gauge, "in_flight", "Requests that are being answered.")
        yield one(Gauge, "waiting", "Requests waiting for one in flight to end.")
        # The label keeps its former name: dashboards query it.
        sources = {source: whole(source) for source in ("prefix", "reused", "recomputed", "fresh")}
        yield several(Counter, "prompt_tokens", "Prompt tokens by the source of their KV.", "fate", sources)
        yield one(Counter, "completion_tokens", "Tokens of answers.")
        fallbacks = sum((collections.Counter(stats.fallbacks) for stats in every), collections.Counter[str]())
        yield several(Counter, "fallbacks", "How often reuse was given up.", "kind", fallbacks)
        found = {"hit": store.hits, "miss": store.misses}
        yield several(Counter, "store_lookups", "Look-ups of chunk KV, including ingestion.", "result", found)
        kept = {"alone": store.entries - store.fused, "fused": store.fused}
        yield several(Gauge, "store_chunks", "Chunks whose KV is stored.", "kind", kept)
        sizes = {"memory": store.memory_bytes, "disk": store.disk_bytes}
        yield several(Gauge, "store_bytes", "Bytes of chunk KV.", "tier", sizes)
        name, about = "cacheclip_time_to_first_token_seconds", "Seconds from the call to the first token."
        times = Histogram(name, about, labels=["method"])
        for method, (classes, seconds) in _times(every).items():
            times.add_metric([method], list(zip(_BOUNDS, accumulate(classes), strict=True)), sum_value=seconds)
        yield times
        audits = sum((collections.Counter(stats.audit.outcomes) for stats in every), collections.Counter[str]())
        outcomes = {outcome: audits[outcome] for outcome in AuditStats().outcomes}
        about = "Prompts that were prefilled again in full, by what came of it."
        yield several(Counter, "audits", about, "outcome", outcomes)
        buckets = accumulate(map(sum, zip(*(stats.audit.classes for stats in every), strict=True)))
        about = "KL divergence of the first token from full prefill, in nats."
        yield Histogram(
            "cacheclip_audit_kl",
            about,
            buckets=list(zip([*map(str, KLS), "+Inf"], buckets, strict=True)),
            sum_value=sum(stats.audit.kl for stats in every),
        )


def _ended(every: Sequence[Stats]) -> collections.Counter[tuple[str, str]]:
    """Requests by method and finish reason."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for stats in every:
        for method, reasons in stats.finished.items():
            found.update({(method, reason): count for reason, count in reasons.items()})
    return found


def _times(every: Sequence[Stats]) -> dict[str, tuple[list[int], float]]:
    """By method: the count of times to the first token in each bucket, and their sum in seconds."""
    found = {}
    for method in sorted({method for stats in every for method in stats.first_token}):
        times = [stats.first_token[method] for stats in every if method in stats.first_token]
        classes = [sum(column) for column in zip(*(one.classes for one in times), strict=True)]
        found[method] = (classes, sum(one.seconds for one in times))
    return found
