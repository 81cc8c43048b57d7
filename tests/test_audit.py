"""Audits: a share of the prompts is prefilled again in full, in idle time, and what differs is counted."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from threads import PATIENCE, join, start, until
from tiny import PASSAGES, tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Audit, ConfigurationError, Engine
from cacheclip_rag.cli import main as cli
from cacheclip_rag.cli import serve as serve_cli
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.model.canvas import Canvas
from cacheclip_rag.observe import OpenTelemetry, Prometheus
from cacheclip_rag.prefill import audit as audit_module
from cacheclip_rag.serving.stats import Audited, AuditStats
from cacheclip_rag.verification import kl

A, B, C, D, E = PASSAGES


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


def opened(backbone: Backbone, audit: float | Audit = 1.0, **options: Any) -> Engine:
    engine = Engine(backbone, method="naive", audit=audit, **options)
    engine.ensure(PASSAGES)
    return engine


@pytest.fixture
def engine(backbone: Backbone) -> Iterator[Engine]:
    with opened(backbone) as engine:
        yield engine


def prompt(engine: Engine, *texts: str) -> str:
    return engine.backbone.chat([{"role": "user", "content": "\n\n".join([*(texts or PASSAGES[:3]), "Who?"])}])


def ask(engine: Engine, *texts: str, **options: Any) -> tuple[int, ...]:
    return engine.generate(prompt(engine, *texts), max_new_tokens=1, **options).ids


def outcomes(engine: Engine) -> dict[str, int]:
    """Those that there are."""
    return {outcome: count for outcome, count in engine.stats().audit.outcomes.items() if count}


class Busy:
    """A request in flight, in the block: there is no idle time."""

    def __init__(self, engine: Engine) -> None:
        self._place = engine.limit.place()

    def __enter__(self) -> None:
        self._place.take()

    def __exit__(self, *_: object) -> None:
        self._place.release()


def waiting() -> list[Any]:
    """What is kept of prompts that wait to be audited, or are being audited."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is audit_module._Waiting]


@pytest.mark.parametrize("piece", [256, 16, 7])
def test_what_is_counted_is_the_difference_from_full_prefill(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(audit_module, "_PIECE", piece)
    expected, changed = 0.0, 0
    for texts in ((A, B, C), (C, A, B), (E, D, A, B)):
        text = prompt(engine, *texts)
        full, ours = (engine.prefill(text, method=method).logits for method in ("full", "naive"))
        expected += kl(full, ours)
        changed += int(full.argmax()) != int(ours.argmax())
    engine.flush()
    stats = engine.stats().audit
    assert (stats.compared, stats.changed) == (3, changed) and expected > 1e-3
    assert stats.kl == pytest.approx(expected, rel=1e-3)
    assert sum(stats.classes) == 3 and json.loads(json.dumps(engine.stats().as_dict()))["audit"]["kl"] == stats.kl


def test_an_answer_is_compared_as_it_was_given_to_the_prompt_as_it_was_asked(engine: Engine) -> None:
    """A method that answers in another order of the chunks is held against the order that was asked for."""
    text = prompt(engine, A, B, C, D)
    method = "query_guided:reorder=True"
    ours, full = engine.prefill(text, method=method), engine.prefill(text, method="full")
    assert not torch.equal(ours.layout.ids, full.layout.ids)
    engine.flush()
    assert engine.stats().audit.kl == pytest.approx(kl(full.logits, ours.logits), rel=1e-3)


@pytest.mark.parametrize(("share", "of"), [(0.25, 10), (0.01, 0), (1.0, 40), (0.0, 0)])
def test_the_share_is_kept(backbone: Backbone, share: float, of: int) -> None:
    with opened(backbone, Audit(share, waiting=64)) as engine:
        draws = iter([(number * 7 % 40 + 0.5) / 40 for number in range(40)])  # evenly spread, in some order
        engine.auditor.chance = lambda: next(draws)
        for _ in range(40):
            ask(engine, A)
        engine.flush()
        assert engine.stats().audit.compared == of and next(draws, None) is None


def test_the_share_is_drawn_evenly_and_apart_from_the_applications_random_numbers(backbone: Backbone) -> None:
    with opened(backbone) as engine:
        random.seed(1)
        before = random.getstate()
        draws = [engine.auditor.chance() for _ in range(20_000)]
        assert random.getstate() == before
        for share in (0.01, 0.1, 0.5):
            chosen = sum(draw < share for draw in draws)
            assert abs(chosen - share * 20_000) < 5 * math.sqrt(20_000 * share * (1 - share))


def test_prompts_without_reuse_are_not_audited(engine: Engine) -> None:
    ask(engine, method="full")
    engine.generate("Nothing that is known stands in here.", max_new_tokens=1)
    engine.flush()
    assert outcomes(engine) == {}


def test_it_is_off_by_default(backbone: Backbone) -> None:
    with Engine(backbone, method="naive") as engine:
        engine.ensure(PASSAGES)
        ask(engine)
        engine.flush()
        assert engine.stats().audit == AuditStats()


@pytest.mark.parametrize("wrong", [-0.1, 1.5, math.nan, True, "0.01", None, 2])
def test_a_share_outside_of_0_to_1_is_refused_before_the_model_is_loaded(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"audit is a number of at least 0 and at most 1, not .*0\.01 audits"):
        Engine("there-is-no-such-model", audit=wrong)


@pytest.mark.parametrize("wrong", [{"limit": -1.0}, {"window": 0}, {"waiting": 0}, {"limit": math.nan}])
def test_other_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"audit's {next(iter(wrong))} is a number of at least"):
        Audit(0.1, **wrong)


def test_what_cannot_be_kept_up_with_is_dropped_and_counted(backbone: Backbone) -> None:
    with opened(backbone, Audit(1.0, waiting=2)) as engine:
        with Busy(engine):
            ask(engine)
            until(lambda: not engine.auditor.waiting)  # it is at hand
            for _ in range(5):
                ask(engine)
            assert engine.auditor.waiting == 2 and outcomes(engine) == {"dropped": 3}
        engine.flush()
        assert engine.stats().audit.compared == 3 and engine.stats().audit.dropped == 3


def test_without_idle_time_it_is_dropped_and_counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_WAIT", 0.01)
    with Busy(engine):
        ask(engine)
        engine.flush()
    assert outcomes(engine) == {"dropped": 1}


def test_requests_go_first_also_in_the_middle_of_an_audit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_module, "_PIECE", 32)
    first, busy, pieces = threading.Event(), Busy(engine), []
    once = engine.backbone.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cacheclip-background":
            pieces.append(None)
            if len(pieces) == 1:
                busy.__enter__()
                first.set()
        return once(*arguments, **options)

    monkeypatch.setattr(engine.backbone, "forward", forward)
    ask(engine)
    assert first.wait(PATIENCE)
    for _ in range(3):
        ask(engine, method="full")
    assert len(pieces) == 1
    busy.__exit__()
    engine.flush()
    assert len(pieces) > 5 and engine.stats().audit.compared == 1


def test_the_end_of_the_process_waits_for_one_piece_and_not_for_all(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "_PIECE", 32)
    once, pieces = engine.backbone.forward, []

    def forward(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cacheclip-background":
            pieces.append(None)
            engine.auditor._background.close()  # as it is done at the interpreter's end
        return once(*arguments, **options)

    monkeypatch.setattr(engine.backbone, "forward", forward)
    ask(engine)
    until(lambda: bool(outcomes(engine)))
    assert len(pieces) == 1 and outcomes(engine) == {"dropped": 1}


def test_what_waits_holds_no_kv_of_the_request(engine: Engine) -> None:
    gc.collect()
    before = sum(type(thing) is Canvas for thing in gc.get_objects())
    with Busy(engine):
        tokens = engine.generate(prompt(engine), max_new_tokens=1).report.prompt_tokens
        [kept] = waiting()
        assert sum(type(thing) is Canvas for thing in gc.get_objects()) == before
        held = [thing for thing in vars(kept).values() if isinstance(thing, torch.Tensor)]
        vocabulary = engine.backbone.model.config.vocab_size
        assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 4 * tokens + 4 * vocabulary
    del kept, held
    engine.flush()
    assert waiting() == [] and engine.stats().audit.compared == 1


def test_forgetting_a_chunk_drops_what_waits_with_it(engine: Engine) -> None:
    with Busy(engine):
        ask(engine, A, B)  # at hand
        until(lambda: not engine.auditor.waiting)
        ask(engine, B, C)
        ask(engine, C, D)
        engine.forget([B])
        until(lambda: len(waiting()) == 1)
        assert outcomes(engine) == {"forgotten": 2}
    engine.flush()
    assert engine.stats().audit.compared == 1 and engine.stats().audit.forgotten == 2


@pytest.mark.parametrize("method", ["prefix-cache", "ragcache", "auto", "query_guided"])
def test_nothing_of_a_forgotten_chunk_waits_whatever_the_method(engine: Engine, method: str) -> None:
    ask(engine, A, B, method=method)  # some methods reuse what an earlier prompt had
    engine.flush()
    before = engine.stats().audit.forgotten
    with Busy(engine):
        ask(engine, A, B, method=method)
        ask(engine, A, B, C, method=method)
        engine.forget([A])
        until(lambda: waiting() == [])
    engine.flush()
    assert engine.stats().audit.forgotten > before


def test_an_observer_may_use_the_engine(engine: Engine) -> None:
    seen: list[Audited] = []

    def use(audited: Audited) -> None:
        engine.ensure(PASSAGES[3:])
        seen.append(audited)

    engine.auditor.observers.append(use)
    with Busy(engine):
        ask(engine, A, B)
        engine.forget([A])
    engine.flush()
    assert [one.outcome for one in seen] == ["forgotten"]


def test_a_chunk_that_another_process_forgot_drops_it(backbone: Backbone, tmp_path: Path) -> None:
    engine, other = (opened(backbone, store=tmp_path) for _ in range(2))
    with engine, other, Busy(engine):
        ask(engine, A, B)
        other.forget([A])
        ask(engine, C, method="full")  # whoever comes next takes note of it
        until(lambda: waiting() == [])
        assert outcomes(engine) == {"forgotten": 1}


def test_a_chunk_that_is_forgotten_before_the_prompt_is_noted_drops_it(engine: Engine) -> None:
    def forgetting() -> float:
        engine.forget([A])
        return 0.0

    engine.auditor.chance = forgetting
    with Busy(engine):
        ask(engine, A, B)
        assert waiting() == [] and outcomes(engine) == {"forgotten": 1}


def test_a_failed_audit_is_counted_and_disturbs_no_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = engine.generate(prompt(engine), max_new_tokens=4).ids
    engine.flush()
    once = engine.backbone.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "cacheclip-background":
            raise RuntimeError("no memory left")
        return once(*arguments, **options)

    monkeypatch.setattr(engine.backbone, "forward", forward)
    assert engine.generate(prompt(engine), max_new_tokens=4).ids == expected
    engine.flush()
    assert outcomes(engine) == {"same": 1, "failed": 1} or outcomes(engine) == {"changed": 1, "failed": 1}
    assert "an audit failed: RuntimeError: no memory left" in caplog.text
    monkeypatch.undo()
    assert engine.generate(prompt(engine), max_new_tokens=4).ids == expected
    engine.flush()
    assert engine.stats().audit.compared == 2


def test_logits_that_are_no_numbers_are_a_failed_audit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    once = engine.backbone.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        result = once(*arguments, **options)
        return result * math.nan if threading.current_thread().name == "cacheclip-background" else result

    monkeypatch.setattr(engine.backbone, "forward", forward)
    ask(engine)
    engine.flush()
    assert outcomes(engine) == {"failed": 1} and engine.stats().audit.kl == 0.0


def test_what_goes_wrong_while_a_prompt_is_noted_disturbs_no_answer(engine: Engine) -> None:
    def broken() -> float:
        raise RuntimeError("no random numbers left")

    engine.auditor.chance = broken
    assert ask(engine) == ask(engine, method="naive:fused=False")


def test_closing_drops_what_waits_and_a_later_prompt_is_audited(engine: Engine) -> None:
    with Busy(engine):
        for _ in range(3):
            ask(engine)
        closing = start(engine.close)
        join(closing)
        assert outcomes(engine) == {"dropped": 3} and waiting() == []
    ask(engine)
    engine.flush()
    assert engine.stats().audit.compared == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are Unix's")
def test_a_forked_process_audits_its_own_and_not_what_waits_in_its_parent(engine: Engine) -> None:
    from torture_serving import child

    with Busy(engine):
        for _ in range(2):
            ask(engine)

        def works() -> None:
            assert len(waiting()) == 1 and engine.auditor.waiting == 0  # in the frame of a thread of the parent's
            engine.flush()
            assert outcomes(engine) == {}
            ask(engine)
            engine.flush()
            assert engine.stats().audit.compared == 1
            engine.close()

        assert child(works) == "ok"
    engine.flush()
    assert engine.stats().audit.compared == 2


def test_a_warning_once_a_window_above_the_limit(backbone: Backbone, caplog: pytest.LogCaptureFixture) -> None:
    def warned(limit: float) -> list[str]:
        caplog.clear()
        with opened(backbone, Audit(1.0, limit=limit, window=2)) as engine:
            for texts in ((A, B), (B, A), (A, B, C), (C, A), (D, A)):
                ask(engine, *texts)
                engine.flush()
            assert engine.stats().audit.compared == 5
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    assert warned(math.inf) == warned(100.0) == []
    said = warned(0.0)
    assert len(said) == 2 and all("over 2 audited prompts (limit 0.00)" in one for one in said)


def test_prometheus_and_opentelemetry_show_audits(engine: Engine) -> None:
    client = pytest.importorskip("prometheus_client")
    pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader, registry = InMemoryMetricReader(), client.CollectorRegistry()
    Prometheus(engine, registry=registry)
    seen: list[Audited] = []

    def broken(_: Audited) -> None:
        raise RuntimeError("the metrics server is away")

    telemetry = OpenTelemetry("tiny", meter_provider=MeterProvider([reader]))
    engine.auditor.observers += [broken, telemetry.audited, seen.append]
    for texts in ((A, B), (A, B, C, D), (E, D, C)):
        ask(engine, *texts)
        engine.flush()
    with Busy(engine):
        ask(engine, A)
        engine.forget([A])
    engine.flush()
    stats = engine.stats().audit
    assert [one.outcome for one in seen].count("forgotten") == 1 and len(seen) == 4
    assert sum(one.kl or 0.0 for one in seen) == pytest.approx(stats.kl) and stats.kl > 0
    assert {one.method for one in seen} == {"naive"}
    for outcome, count in stats.outcomes.items():
        assert registry.get_sample_value("cacheclip_audits_total", {"outcome": outcome}) == count
    assert registry.get_sample_value("cacheclip_audit_kl_sum") == pytest.approx(stats.kl)
    assert registry.get_sample_value("cacheclip_audit_kl_count") == 3
    assert registry.get_sample_value("cacheclip_audit_kl_bucket", {"le": "0.001"}) == stats.classes[0]
    metrics = {m.name: m for m in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics}
    counted = {p.attributes["cacheclip.audit.outcome"]: p.value for p in metrics["cacheclip.audits"].data.data_points}
    assert counted == outcomes(engine)
    [point] = metrics["cacheclip.audit.kl"].data.data_points
    assert (point.count, point.sum) == (3, pytest.approx(stats.kl))


def test_inside_vllm_it_is_refused_and_the_embedded_server_checks_the_share(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(serve_cli, "find_spec", lambda name: name)
    flags = ["serve", "there-is-no-such-model", "--store", str(tmp_path), "--audit"]
    result = CliRunner().invoke(cli.app, [*flags, "0.5"])
    assert result.exit_code == 2 and "--embedded" in result.stderr
    result = CliRunner().invoke(cli.app, [*flags, "1.5", "--embedded"])
    assert result.exit_code == 2 and "--audit" in result.stderr
