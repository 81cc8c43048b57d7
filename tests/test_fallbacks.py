"""A failure inside reuse costs time and is reported; it never costs the answer, nor memory."""

from __future__ import annotations

import gc
import weakref

import pytest
from tiny import PASSAGES, prompt_of

from cacheclip_rag import METHODS
from cacheclip_rag.methods.select.query_guided import QueryGuided
from cacheclip_rag.prompt import align


def test_a_failure_late_in_reuse_leaves_no_counts_of_it_behind(engine, monkeypatch):
    prompt = prompt_of(engine, PASSAGES)
    engine.prefill(prompt)
    monkeypatch.setattr("cacheclip_rag.prefill.compose.sources_of", broken)
    report = engine.prefill(prompt).report
    assert "full prefill" in report.fallbacks[0] and report.cached_tokens == 0
    assert (report.prefix, report.reused, report.recomputed, report.edges) == (0, 0, 0, 0)
    assert report.fresh == report.prompt_tokens


@pytest.fixture
def answers(engine):
    prompt = prompt_of(engine, PASSAGES)
    return prompt, list(engine.generate(prompt, method="full", max_new_tokens=8).ids)


def broken(*_: object, **__: object):
    raise RuntimeError("the disk is on fire")


def broken_once(function):
    """Fails at its first call; then it is ``function`` again (or the genuine `align`)."""
    from cacheclip_rag import prompt

    calls = iter([True])

    def wrapper(*args, **kwargs):
        if next(calls, False):
            raise RuntimeError("once")
        return (function or prompt.align)(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize(
    "breakage",
    [
        lambda e, m: m.setattr(e.library.store, "get", broken),
        lambda e, m: m.setattr(e.index, "find", broken_once(e.index.find)),
        lambda e, m: m.setattr("cacheclip_rag.prefill.reading.align", broken_once(align)),
        lambda e, m: m.setattr(QueryGuided, "select", broken),
        lambda e, m: m.setattr(QueryGuided, "select", lambda self, request, budget: request.rows + 10**6),
    ],
    ids=["load", "recognise", "align", "select", "rows that do not exist"],
)
def test_a_failure_in_reuse_falls_back_to_full_prefill_and_says_so(engine, answers, monkeypatch, breakage):
    prompt, expected = answers
    breakage(engine, monkeypatch)
    answer = engine.generate(prompt, max_new_tokens=8)
    assert list(answer.ids) == expected
    assert "full prefill" in answer.report.fallbacks[0]
    assert answer.report.fresh == answer.report.prompt_tokens and answer.report.reused == 0


@pytest.mark.parametrize(
    "breakage",
    [
        lambda e, m: m.setattr(e.library.store, "refresh", broken),
        lambda e, m: m.setattr(e.usage, "note", broken),
        lambda e, m: (
            e.library.store.delete([e.library.key(PASSAGES[0])]),
            m.setattr("threading.Thread.start", broken),
        ),
    ],
    ids=["follow other processes", "count", "encode again"],
)
def test_what_fails_beside_an_answer_does_not_cost_it(engine, answers, monkeypatch, breakage):
    prompt, expected = answers
    breakage(engine, monkeypatch)
    assert list(engine.generate(prompt, recompute_ratio=1.0, max_new_tokens=8).ids) == expected
    assert engine.generate(prompt, method="naive", max_new_tokens=1).report.reused > 0


def test_after_a_fallback_the_report_tells_nothing_of_what_failed(engine, monkeypatch):
    monkeypatch.setattr(QueryGuided, "select", broken)
    report = engine.generate(prompt_of(engine, PASSAGES), method="auto", max_new_tokens=1).report
    assert report.fallbacks and report.fit is None and report.requested_ratio == METHODS["auto"].recompute_ratio


def test_a_chunk_that_is_not_encoded_as_a_method_wants_it_is_told_so(engine):
    report = engine.generate(prompt_of(engine, PASSAGES), method="psr", max_new_tokens=2).report
    assert len(report.fallbacks) == len(PASSAGES)
    assert all('not encoded as psr wants it; engine.ensure(texts, method="psr")' in told for told in report.fallbacks)
    engine.flush()
    assert engine.generate(prompt_of(engine, PASSAGES), method="psr", max_new_tokens=2).report.fallbacks == []


def test_chunks_whose_kv_vanished_are_prefilled_and_encoded_again_in_the_background(engine):
    gone = [engine.library.key(text) for text in PASSAGES[1:3]]
    engine.library.store.delete(gone)
    report = engine.generate(prompt_of(engine, PASSAGES), method="naive", max_new_tokens=2).report
    assert len(report.fallbacks) == 2 and report.fresh > len(PASSAGES[1]) + len(PASSAGES[2])
    assert [use.missing is not None for use in report.chunks] == [False, True, True, False, False]
    engine.flush()
    assert all(key in engine.library.store for key in gone)
    assert engine.generate(prompt_of(engine, PASSAGES), method="naive", max_new_tokens=2).report.fallbacks == []


def test_what_reuse_held_when_it_failed_is_free_before_the_fallback_begins(engine, monkeypatch):
    """Or the fallback from a lack of memory would lack the same memory."""
    canvases, alive = [], []
    opened, full = engine.backbone.canvas, engine.prefiller.strategies["full"]

    def canvas(*args):
        made = opened(*args)
        canvases.append(weakref.ref(made))
        return made

    def spy(*args):
        alive.append([ref() for ref in canvases if ref() is not None])
        return full(*args)

    monkeypatch.setattr(engine.backbone, "canvas", canvas)
    monkeypatch.setitem(engine.prefiller.strategies, "full", spy)
    monkeypatch.setattr(QueryGuided, "select", broken)
    assert "full prefill" in engine.prefill(prompt_of(engine, PASSAGES)).report.fallbacks[0]
    assert len(canvases) == 2 and alive == [[]]


def test_a_request_leaves_no_memory_behind(engine, monkeypatch):
    """Not until Python gets round to collecting circles, but at once: gigabytes a request on a busy server."""
    canvases, opened = [], engine.backbone.canvas

    def canvas(*args):
        made = opened(*args)
        canvases.append(weakref.ref(made))
        return made

    monkeypatch.setattr(engine.backbone, "canvas", canvas)
    gc.disable()
    try:
        for method in ("auto", "full", "prefix-cache", "psr", "infoflow:reorder=True"):
            engine.generate(prompt_of(engine, PASSAGES), method=method, max_new_tokens=2)
            engine.flush()  # what it found missing is encoded in the background
            assert canvases and all(ref() is None for ref in canvases), method
    finally:
        gc.enable()


def test_every_chunk_gone_gives_full_prefills_answer(engine, answers):
    prompt, expected = answers
    engine.library.store.delete([e.key for e in engine.library.store.entries()])
    assert list(engine.generate(prompt, max_new_tokens=8).ids) == expected
