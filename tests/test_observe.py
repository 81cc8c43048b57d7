"""Requests as traces, metrics and log lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine, Report
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.observe import OpenTelemetry, Prometheus, attributes


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(tiny_backbone(), method="query_guided") as engine:
        engine.ensure(PASSAGES)
        yield engine


def ask(engine: Engine) -> Report:
    prompt = engine.backbone.chat([{"role": "user", "content": "\n\n".join([*PASSAGES[:3], "Who built it?"])}])
    return engine.generate(prompt, max_new_tokens=2).report


def test_only_what_was_not_recomputed_is_read_from_cache(engine: Engine) -> None:
    report = ask(engine)
    assert report.recomputed > 0
    about = attributes(report, "tiny")
    read = report.prompt_tokens - report.recomputed - report.fresh
    assert about["gen_ai.usage.cache_read.input_tokens"] == read
    assert about["llm.token_count.prompt_details.cache_read"] == read
    assert about["gen_ai.usage.input_tokens"] == report.prompt_tokens  # those from cache included
    assert about["gen_ai.request.model"] == "tiny" and about["cacheclip.tokens.recomputed"] == report.recomputed


class Traced:
    """A tracer and a meter that keep what they are told."""

    def __init__(self) -> None:
        trace = pytest.importorskip("opentelemetry.sdk.trace")
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.spans, self.reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.tracers = trace.TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.spans))
        self.meters = MeterProvider([self.reader])

    def observer(self, **options: Any) -> OpenTelemetry:
        return OpenTelemetry("tiny", tracer_provider=self.tracers, meter_provider=self.meters, **options)


def test_a_request_is_a_span_below_its_callers(engine: Engine) -> None:
    traced = Traced()
    engine.observers.append(traced.observer())
    with traced.tracers.get_tracer("app").start_as_current_span("query"):
        report = ask(engine)
    ours, callers = traced.spans.get_finished_spans()
    assert ours.name == "text_completion tiny" and ours.parent.span_id == callers.context.span_id
    assert (ours.end_time - ours.start_time) / 1e9 == pytest.approx(report.total, abs=1e-6)
    assert ours.attributes["gen_ai.usage.cache_read.input_tokens"] == report.cached_tokens
    assert ours.attributes["gen_ai.response.finish_reasons"] == ("length",)
    [metric] = traced.reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    [point] = metric.data.data_points
    assert metric.name == "gen_ai.server.time_to_first_token"
    assert (point.count, point.sum) == (1, report.ttft)


def test_it_adds_to_the_span_that_is_there(engine: Engine) -> None:
    traced = Traced()
    engine.observers.append(traced.observer(span="current"))
    with traced.tracers.get_tracer("app").start_as_current_span("llm"):
        report = ask(engine)
    [span] = traced.spans.get_finished_spans()
    assert span.name == "llm" and span.attributes["gen_ai.usage.cache_read.input_tokens"] == report.cached_tokens
    with pytest.raises(ConfigurationError, match="current"):
        traced.observer(span="theirs")


def test_a_failed_request_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    traced = Traced()
    engine.observers.append(traced.observer())

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.backbone.computer, "forward_one", broken)
    with pytest.raises(RuntimeError):
        ask(engine)
    [span] = traced.spans.get_finished_spans()
    assert span.status.status_code.name == "ERROR"


def test_prometheus_shows_what_engines_count(engine: Engine) -> None:
    client = pytest.importorskip("prometheus_client")
    registry = client.CollectorRegistry()
    with Engine(engine.backbone, method="naive") as other:
        Prometheus(engine, other, registry=registry)
        reports = [ask(engine), ask(engine), ask(other)]

        def value(name: str, **labels: str) -> float:
            return registry.get_sample_value(name, labels) or 0.0

        assert value("cacheclip_requests_total", method="query_guided", finish_reason="length") == 2
        assert value("cacheclip_requests_total", method="naive", finish_reason="length") == 1
        assert value("cacheclip_in_flight") == 0
        for fate in ("prefix", "reused", "recomputed", "fresh"):
            counted = value("cacheclip_prompt_tokens_total", fate=fate)
            assert counted == sum(getattr(report, fate) for report in reports)
        assert value("cacheclip_prompt_tokens_total", fate="recomputed") > 0
        assert value("cacheclip_completion_tokens_total") == 6
        first = "cacheclip_time_to_first_token_seconds"
        assert value(f"{first}_count", method="query_guided") == 2
        assert value(f"{first}_sum", method="query_guided") == pytest.approx(sum(r.ttft for r in reports[:2]))
        assert value(f"{first}_bucket", method="query_guided", le="+Inf") == 2
        assert value("cacheclip_store_chunks", kind="alone") == len(PASSAGES)
        assert value("cacheclip_store_bytes", tier="memory") == engine.stats().store.nbytes > 0
        engine.forget(PASSAGES)
        assert value("cacheclip_store_chunks", kind="alone") == 0
        with pytest.raises(ValueError, match="Duplicated"):
            Prometheus(engine, registry=registry)
    with pytest.raises(ConfigurationError, match=r"Prometheus\(engine\)"):
        Prometheus(registry=client.CollectorRegistry())


def test_a_request_is_one_line_in_the_log(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cacheclip_rag"):
        report = ask(engine)
    assert [record.getMessage() for record in caplog.records] == [report.line]


def test_a_broken_observer_breaks_no_answer(engine: Engine) -> None:
    seen: list[Report] = []

    def broken(_: Report) -> None:
        raise RuntimeError("the metrics server is away")

    engine.observers += [broken, seen.append]
    assert seen == [ask(engine)]
