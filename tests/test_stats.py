"""`Engine.stats`: every request is counted once, by what happened to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine, Report
from cacheclip_rag.methods.select.query_guided import QueryGuided
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.serving import limit
from cacheclip_rag.serving.stats import SECONDS, Tally
from cacheclip_rag.store import StoreStats


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone()


@pytest.fixture
def engine(backbone: Backbone, tmp_path: Path) -> Iterator[Engine]:
    with Engine(backbone, method="query_guided", store=tmp_path) as engine:
        engine.ensure(PASSAGES)
        yield engine


def prompt(engine: Engine, count: int = 3) -> str:
    return engine.backbone.chat([{"role": "user", "content": "\n\n".join([*PASSAGES[:count], "Who built it?"])}])


def test_tokens_and_requests_are_the_sum_of_the_reports(engine: Engine) -> None:
    reports = [engine.generate(prompt(engine), max_new_tokens=2).report for _ in range(2)]
    reports.append(engine.generate(prompt(engine), max_new_tokens=1, method="naive").report)
    stats = engine.stats()
    assert stats.requests == 3 and stats.finished == {"query_guided": {"length": 2}, "naive": {"length": 1}}
    for name in ("prompt_tokens", "prefix", "reused", "recomputed", "fresh", "completion_tokens"):
        assert getattr(stats, name) == sum(getattr(report, name) for report in reports), name
    assert stats.cached_tokens == sum(report.cached_tokens for report in reports)
    assert stats.computed_tokens == sum(report.computed_tokens for report in reports) > 0
    assert (stats.chunks, stats.missing, stats.fallbacks) == (9, 0, {})
    assert stats.first_token["query_guided"].seconds == pytest.approx(reports[0].ttft + reports[1].ttft)
    assert stats.first_token["naive"].count == 1
    assert (stats.in_flight, stats.waiting) == (0, 0)
    assert json.loads(json.dumps(stats.as_dict()))["cached_tokens"] == stats.cached_tokens


def test_what_is_not_a_request_is_not_counted(engine: Engine) -> None:
    engine.prefill(prompt(engine))
    engine.stream(prompt(engine))  # nobody ever read it
    assert engine.stats().requests == engine.stats().prompt_tokens == 0


def test_a_request_in_flight_is_seen_and_then_counted(engine: Engine) -> None:
    stream = engine.stream(prompt(engine), max_new_tokens=8)
    next(stream)
    assert (engine.stats().in_flight, engine.stats().requests) == (1, 0)
    stream.close()
    assert engine.stats().finished == {"query_guided": {"cancelled": 1}} and engine.stats().in_flight == 0


def test_who_waits_for_a_place_is_seen(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit, "REST", float("inf"))  # the stream passes for one that is being read
    with Engine(backbone, method="naive", max_requests=1) as engine:
        stream = engine.stream(prompt(engine), max_new_tokens=8)
        next(stream)
        other = threading.Thread(target=engine.generate, args=(prompt(engine),), kwargs={"max_new_tokens": 1})
        other.start()
        while not engine.stats().waiting:
            pass
        assert (engine.stats().in_flight, engine.stats().waiting) == (1, 1)
        stream.close()
        other.join()
        assert (engine.stats().in_flight, engine.stats().waiting, engine.stats().requests) == (0, 0, 2)


def test_fallbacks_by_reason(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = engine.library.key(PASSAGES[0])
    engine.library.store.delete([gone])
    engine.generate(prompt(engine), max_new_tokens=1)
    stats = engine.stats()
    assert stats.fallbacks == {"chunk": 1} and (stats.chunks, stats.missing) == (3, 1)
    engine.flush()

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory: at all")

    monkeypatch.setattr(QueryGuided, "select", broken)
    engine.generate(prompt(engine), max_new_tokens=1)
    assert engine.stats().fallbacks == {"chunk": 1, "full prefill": 1}


def test_what_is_stored_where(engine: Engine, backbone: Backbone, tmp_path: Path) -> None:
    first = engine.stats().store
    assert (first.entries, first.fused) == (len(PASSAGES), 0)
    assert first.disk_bytes == first.nbytes == sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    held = [engine.library.get(engine.library.key(text)) for text in PASSAGES]
    assert first.memory_bytes == sum(chunk.nbytes for chunk in held if chunk is not None)
    engine.fuse({PASSAGES[0]: PASSAGES[1:3]})
    assert (engine.stats().store.entries, engine.stats().store.fused) == (len(PASSAGES) + 1, 1)
    with Engine(backbone, method="query_guided", store=tmp_path) as again:
        assert again.stats().store.fused == 1 and again.stats().store.memory_bytes == 0
        again.generate(prompt(again), max_new_tokens=1)
        looked = again.stats().store
        assert (looked.hits, looked.misses) == (3, 0) and looked.memory_bytes > 0
        again.generate(prompt(again), max_new_tokens=1)  # from memory now
        assert (again.stats().store.hits, again.stats().store.misses) == (6, 0)
        again.library.get("0" * 64)
        assert (again.stats().store.hits, again.stats().store.misses) == (6, 1)


def test_other_encodings_and_the_auxiliary_model_count_too(backbone: Backbone) -> None:
    with Engine(backbone, auxiliary=tiny_backbone("qwen2"), method="query_guided") as engine:
        engine.ensure(PASSAGES[:2])
        own = engine.stats().store
        assert engine.auxiliary is not None
        aside = engine.auxiliary.library.store.stats()
        assert own.entries == 2 and own.nbytes == engine.library.store.stats().nbytes + aside.nbytes > aside.nbytes > 0
        engine.ensure(PASSAGES[:1], method="promptcache")
        assert engine.stats().store.entries == 3 and engine.stats().store.nbytes > own.nbytes


def test_memory_bytes_caps_what_all_encodings_keep_together(backbone: Backbone) -> None:
    with Engine(backbone, auxiliary=tiny_backbone("qwen2"), method="query_guided") as roomy:
        roomy.ensure(PASSAGES)
        enough = roomy.stats().store.memory_bytes
    with Engine(backbone, auxiliary=tiny_backbone("qwen2"), method="query_guided", memory_bytes=enough) as engine:
        engine.ensure(PASSAGES)
        assert engine.stats().store.memory_bytes == enough and engine.stats().store.evicted == 0
        engine.ensure(PASSAGES, method="promptcache")
        assert 0 < engine.stats().store.memory_bytes <= enough and engine.stats().store.evicted > 0
        assert engine.generate(prompt(engine), max_new_tokens=1).report.fallbacks  # what is gone is told, and prefilled


def test_times_fall_into_classes() -> None:
    tally = Tally()
    for seconds in (SECONDS[0], 0.2, 0.21, 1e9):
        tally.add(Report("naive", 0.0, completion_tokens=1, ttft=seconds, finish_reason="stop"))
    tally.add(Report("naive", 0.0, finish_reason="error"))  # never had a first token
    times = tally.snapshot(0, 0, StoreStats(), {}).first_token["naive"]
    assert times.classes == (1, 0, 2, *[0] * (len(SECONDS) - 3), 1) and times.count == 4


def test_a_snapshot_does_not_change_and_threads_lose_nothing() -> None:
    tally = Tally()
    before = tally.snapshot(0, 0, StoreStats(), {})

    def count() -> None:
        for _ in range(500):
            tally.add(Report("naive", 0.0, fresh=2, fallbacks=["chunk 01 prefilled: gone"], finish_reason="stop"))
            tally.snapshot(0, 0, StoreStats(), {})

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = tally.snapshot(0, 0, StoreStats(), {})
    assert (after.requests, after.fresh, after.fallbacks) == (4000, 8000, {"chunk": 4000})
    assert before.requests == before.fresh == 0 and before.fallbacks == {}
