"""Requests as traces, told of one by one, and as metrics, which are read from `Engine.stats`:

    engine.observers.append(OpenTelemetry("qwen2.5-coder-1.5b-instruct"))
    Prometheus(engine)

What each needs is loaded when it is made: ``pip install 'cacheclip-rag[otel]'`` or ``'cacheclip-rag[prometheus]'``.
Both count as read from cache only tokens whose KV was reused and not recomputed, and neither sees any text.
"""

from .otel import OpenTelemetry, attributes
from .prometheus import Prometheus

__all__ = ["OpenTelemetry", "Prometheus", "attributes"]
