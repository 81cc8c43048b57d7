"""OpenTelemetry: a span and the time to the first token of each request."""

from __future__ import annotations

import time
from typing import Any, Literal

from ..errors import ConfigurationError
from ..report import Report


def attributes(report: Report, model: str = "") -> dict[str, Any]:
    """A request under the names of OpenTelemetry's GenAI conventions and of OpenInference, and under our own."""
    ours = {
        "method": report.method,
        "ratio": report.ratio,
        "chunks": len(report.chunks),
        "tokens.prefix": report.prefix,
        "tokens.reused": report.reused,
        "tokens.recomputed": report.recomputed,
        "tokens.fresh": report.fresh,
        "time_to_first_token": report.ttft,
        **{f"seconds.{stage}": value for stage, value in report.seconds.items()},
    }
    named: dict[str, Any] = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "cacheclip",
        "gen_ai.usage.input_tokens": report.prompt_tokens,
        "gen_ai.usage.output_tokens": report.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": report.cached_tokens,
        "gen_ai.response.finish_reasons": (report.finish_reason,),
        "llm.token_count.prompt": report.prompt_tokens,
        "llm.token_count.completion": report.completion_tokens,
        "llm.token_count.prompt_details.cache_read": report.cached_tokens,
        **{f"cacheclip.{name}": value for name, value in ours.items()},
    }
    if model:
        named["gen_ai.request.model"] = model
    if report.fallbacks:
        named["cacheclip.fallbacks"] = tuple(report.fallbacks)
    return named


class OpenTelemetry:
    """Tells a tracer and a meter of each request.

    ``span="own"`` makes a span of each request, below the one that is current; ``"current"`` adds to the current one:
    for applications where a framework's instrumentation makes a span for the model's call already, so that backends do
    not count its tokens twice. Providers default to the process's own.
    """

    def __init__(
        self,
        model: str = "",
        span: Literal["own", "current"] = "own",
        tracer_provider: Any = None,
        meter_provider: Any = None,
    ) -> None:
        """Raises `ConfigurationError` without opentelemetry-api, or for another ``span``."""
        try:
            from opentelemetry import metrics, trace
        except ImportError as error:
            raise ConfigurationError("traces need opentelemetry-api: pip install 'cacheclip-rag[otel]'") from error
        if span not in ("own", "current"):
            raise ConfigurationError(f'span must be "own" or "current", not {span!r}')
        self._model, self._span, self._trace = model, span, trace
        self._tracer = trace.get_tracer("cacheclip_rag", tracer_provider=tracer_provider)
        meter = metrics.get_meter("cacheclip_rag", meter_provider=meter_provider)
        self._first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token", unit="s", description="Seconds from the call to the first token."
        )

    def __call__(self, report: Report) -> None:
        about = attributes(report, self._model)
        if self._span == "current":
            self._trace.get_current_span().set_attributes(about)
        else:
            end = time.time_ns()
            name = f"text_completion {self._model}".strip()
            kind = self._trace.SpanKind.INTERNAL  # the model runs in this process
            start = end - int(report.total * 1e9)
            span = self._tracer.start_span(name, kind=kind, attributes=about, start_time=start)
            if report.finish_reason == "error":
                span.set_status(self._trace.StatusCode.ERROR)
            span.end(end)
        if report.completion_tokens:
            labels = {"cacheclip.method": report.method, "gen_ai.provider.name": "cacheclip"}
            self._first_token.record(
                report.ttft, labels | ({"gen_ai.request.model": self._model} if self._model else {})
            )
