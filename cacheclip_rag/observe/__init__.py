"""Observability: OpenTelemetry traces of requests, and Prometheus metrics from `Engine.stats`.

    engine.observers.append(OpenTelemetry("qwen2.5-coder-1.5b-instruct"))
    Prometheus(engine)

Each needs an extra: ``pip install 'cacheclip-rag[otel]'`` or ``'cacheclip-rag[prometheus]'``. Both count as cache reads
only tokens whose KV was reused and not recomputed. Neither exports any text.
"""

from .otel import OpenTelemetry, attributes
from .prometheus import Prometheus

__all__ = ["OpenTelemetry", "Prometheus", "attributes"]
