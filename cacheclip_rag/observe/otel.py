"""OpenTelemetry: a span per request, and a histogram of times to the first token."""

from __future__ import annotations

import time
from typing import Any, Literal

from ..errors import ConfigurationError
from ..report import Report
from ..serving.stats import Audited


def attributes(report: Report, model: str = "") -> dict[str, Any]:
    """The span attributes of a request: OpenTelemetry's GenAI conventions, OpenInference's, and ``cacheclip.*``."""
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
    """An observer that exports each request as a span and its time to the first token as a metric; `audited` is one of
    audits.

    ``span="own"`` creates a child span of the current one for each request; ``"current"`` adds attributes to the
    current span instead: for applications whose framework already creates a span for the model call, so that backends
    do not count tokens twice. Providers default to the global ones.
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

        self._audits = meter.create_counter(
            "cacheclip.audits", description="Prompts that were prefilled again in full, by what came of it."
        )
        self._kl = meter.create_histogram(
            "cacheclip.audit.kl", description="KL divergence of the first token from full prefill, in nats."
        )

    def audited(self, audited: Audited) -> None:
        """Count an audit, and record its KL: ``engine.auditor.observers.append(telemetry.audited)``."""
        labels = {"cacheclip.method": audited.method}
        self._audits.add(1, labels | {"cacheclip.audit.outcome": audited.outcome})
        if audited.kl is not None:
            self._kl.record(audited.kl, labels)

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
