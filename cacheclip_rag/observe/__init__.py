"""Requests as traces and metrics. An observer is any callable that takes a `Report`:

    engine.observers.append(OpenTelemetry("qwen2.5-coder-1.5b-instruct"))
    engine.observers.append(Prometheus())

What each needs is loaded when it is made: ``pip install 'cacheclip-rag[otel]'`` or ``'cacheclip-rag[prometheus]'``.
Both count as read from cache only tokens whose KV was reused and not recomputed, and neither sees any text.
"""

from .otel import OpenTelemetry, attributes
from .prometheus import Prometheus

__all__ = ["OpenTelemetry", "Prometheus", "attributes"]
