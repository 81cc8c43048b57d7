"""Chunks are loaded beside other work; what is quicker computed is computed; neither changes an answer."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stores import HUGE, MODEL, make, open_disk, same
from tiny import PASSAGES, prompt_of, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.chunks import ChunkKV, canonical
from cacheclip_rag.store import DiskStore, LoadingCost, MemoryStore, NotWorthLoading, Remote, TieredStore, loading_cost
from cacheclip_rag.store.loading_cost import DISK, REMOTE

MIB = 1 << 20


def measured(load: float, compute: float, tier: str = DISK) -> LoadingCost:
    """A machine that takes ``load`` seconds for a MiB and ``compute`` seconds for a token."""
    cost = LoadingCost()
    for _ in range(9):
        cost.loaded(tier, MIB, load)
        cost.computed(100, 100 * compute)
    return cost


# ---- the decision -------------------------------------------------------------------------------------------------


def test_what_takes_longer_to_load_than_to_compute_is_computed() -> None:
    cost = measured(load=1.0, compute=0.01)
    assert cost.why_computed(DISK, 2 * MIB, 201) is None, "2.01 s to compute, 2 s to load"
    reason = cost.why_computed(DISK, 2 * MIB, 199)
    assert reason is not None and "2.0 MiB in 2 s, 199 tokens in 1.99 s" in reason
    assert cost.why_computed(REMOTE, 2 * MIB, 1) is None, "nothing was loaded from there"


def test_nothing_is_decided_before_both_are_known() -> None:
    cost = LoadingCost()
    for number in range(6):
        assert cost.why_computed(DISK, 100 * MIB, 1) is None
        cost.loaded(DISK, MIB, 1.0)
        if number < 2:
            cost.computed(100, 0.1)
    cost.computed(31, 0.0001)  # a decoding step, or little more
    assert cost.why_computed(DISK, 100 * MIB, 1) is None
    cost.computed(100, 0.1)
    assert cost.why_computed(DISK, 100 * MIB, 1) is not None


def test_one_slow_read_changes_nothing_and_many_do_until_it_is_quick_again() -> None:
    cost = measured(load=0.1, compute=0.01)
    seen = []
    for seconds in [50.0, *[0.1] * 8, *[50.0] * 9, *[0.1] * 9]:
        cost.loaded(DISK, MIB, seconds)
        seen.append(cost.why_computed(DISK, MIB, 100) is not None)
    assert not any(seen[:9]) and seen[17] and not seen[-1]
    assert sum(a != b for a, b in pairwise(seen)) == 2


def test_what_is_nearly_as_quick_either_way_does_not_alternate() -> None:
    cost = measured(load=1.0, compute=0.01)
    seen = set()
    for number in range(40):
        cost.loaded(DISK, MIB, 1.1 if number // 10 % 2 else 0.9)
        seen.add(cost.why_computed(DISK, MIB, 100) is None)
    assert len(seen) == 1


def test_a_moment_is_not_worth_a_decision() -> None:
    cost = measured(load=0.01, compute=0.00001)
    assert cost.why_computed(DISK, MIB, 1) is None and cost.why_computed(DISK, 3 * MIB, 1) is not None


def test_parallel_loads_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads of a MiB in the same second are two MiB a second; one that finds nothing is none."""
    now = [0.0]
    monkeypatch.setattr(loading_cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    cost = LoadingCost()
    for _ in range(3):
        with cost.loading(DISK) as one, cost.loading(DISK) as other:
            now[0] += 1.0
            one(MIB), other(MIB)
        with cost.loading(DISK):
            now[0] += 100.0
        cost.computed(100, 0.1)
    assert "in 10 s" in str(cost.why_computed(DISK, 20 * MIB, 1))


def test_loads_that_never_pause_are_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loading_cost, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    cost = measured(load=1e-9, compute=0.001)
    with cost.loading(DISK):
        for _ in range(40):
            with cost.loading(DISK) as loaded:
                now[0] += 2.0
                loaded(MIB)
    assert "in 2 s" in str(cost.why_computed(DISK, MIB, 1))


# ---- the store ----------------------------------------------------------------------------------------------------


class Slow(DiskStore):
    """A disk that begins to read when it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, MODEL, HUGE, sync=False)
        self.began, self.go_on, self.reads = threading.Event(), threading.Event(), 0

    def get(self, key: str) -> ChunkKV | None:
        chunk = super().get(key)
        self.reads += 1
        self.began.set()
        assert self.go_on.wait(60)
        return chunk


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What these return, each in a thread of its own."""
    got: list[Any] = [None] * len(works)
    threads = [
        threading.Thread(target=lambda n=n, work=work: got.__setitem__(n, work()))  # type: ignore[misc]
        for n, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return got


def test_look_ups_of_a_chunk_at_the_same_time_load_it_once(tmp_path: Path) -> None:
    key, slow = MODEL.key("text 0"), Slow(tmp_path)
    slow.put(key, make("text 0"))
    tiers = TieredStore(MemoryStore(HUGE), slow)

    def late() -> ChunkKV | None:
        assert slow.began.wait(60)
        threading.Timer(0.05, slow.go_on.set).start()
        return tiers.get(key)

    got = in_threads(lambda: tiers.get(key), late, late)
    assert same(got[0], make("text 0")) and all(chunk is got[0] for chunk in got) and slow.reads == 1


def test_who_asks_after_a_deletion_gets_what_was_stored_since_and_not_what_was_read_before(tmp_path: Path) -> None:
    key, slow = MODEL.key("text 0"), Slow(tmp_path)
    slow.put(key, make("text 0"))
    tiers = TieredStore(MemoryStore(1), slow)  # nothing stays in memory

    def delete_and_ask() -> ChunkKV | None:
        assert slow.began.wait(60)
        tiers.delete([key])
        assert key not in tiers and tiers.put(key, make("text 0", seed=1))
        threading.Timer(0.05, slow.go_on.set).start()
        return tiers.get(key)

    before, since = in_threads(lambda: tiers.get(key), delete_and_ask)
    assert before is None and same(since, make("text 0", seed=1))


def test_who_waits_for_a_look_up_that_fails_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, slow = MODEL.key("text 0"), Slow(tmp_path)
    slow.put(key, make("text 0"))
    tiers = TieredStore(MemoryStore(HUGE), slow)
    get, failing = slow.get, [True]

    def fails_once(key: str) -> ChunkKV | None:
        fails = bool(failing) and failing.pop()
        chunk = get(key)
        if fails:
            raise KeyboardInterrupt
        return chunk

    monkeypatch.setattr(slow, "get", fails_once)

    def interrupted() -> str | None:
        try:
            tiers.get(key)
        except KeyboardInterrupt:
            return "interrupted"
        return None

    def late() -> ChunkKV | None:
        assert slow.began.wait(60)
        threading.Timer(0.05, slow.go_on.set).start()
        return tiers.get(key)

    got = in_threads(interrupted, late)
    assert got[0] == "interrupted" and same(got[1], make("text 0"))


def test_memory_is_free_and_what_is_not_worth_loading_comes_for_those_who_ask_later(tmp_path: Path) -> None:
    disk, key = open_disk(tmp_path), MODEL.key("text 0")
    disk.put(key, make("text 0", tokens=2000))
    tiers = TieredStore(MemoryStore(HUGE), disk, cost=measured(load=1.0, compute=0.0001))
    with pytest.raises(NotWorthLoading, match="loading it from disk takes longer"):
        tiers.weigh(key, 1000)
    tiers._later.flush()
    tiers.weigh(key, 1000)
    assert key in tiers.tiers[0] and same(tiers.get(key), make("text 0", tokens=2000))
    tiers.weigh(MODEL.key("text 1"), 1000), "what is nowhere is not weighed"


# ---- the embedded engine ------------------------------------------------------------------------------------------


@pytest.fixture
def remote() -> Remote:
    pytest.importorskip("fsspec")
    return Remote(f"memory://{uuid.uuid4().hex}", timeout=60)


def only_there(engine: Engine, keys: list[str]) -> None:
    """Let the engine's remote alone have these chunks."""
    engine.flush()
    for tier in engine.library.store.tiers:  # type: ignore[attr-defined]
        tier.delete(keys)


def slow_down(engine: Engine, tier: str) -> None:
    for _ in range(9):
        engine.collections.cost.loaded(tier, 1, 1.0)
        engine.collections.cost.computed(1000, 0.1)


def test_a_slow_remote_leads_to_computing_the_same_answer_and_the_reason(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(tiny_backbone(), store=tmp_path, remote=remote) as engine:
        engine.ensure(PASSAGES)
        prompt = prompt_of(engine, PASSAGES)
        only_there(engine, [engine.library.key(text) for text in PASSAGES[3:]])
        slow_down(engine, REMOTE)
        held = threading.Event()
        cat = remote.fs.cat_file
        monkeypatch.setattr(remote.fs, "cat_file", lambda *a, **o: (held.wait(60), cat(*a, **o))[1])
        mixed = engine.generate(prompt, max_new_tokens=8)
        report = mixed.report
        slow = [use.missing for use in report.chunks]
        assert slow[:3] == [None] * 3 and report.reused > 0
        assert all("loading it from the remote takes longer than computing it" in str(why) for why in slow[3:])
        assert len(report.fallbacks) == 2 and str(slow[3]) in report.fallbacks[0]
        with Engine(engine.backbone) as other:
            other.ensure(PASSAGES)
            other.library.store.delete([other.library.key(text) for text in PASSAGES[3:]])
            assert other.generate(prompt, max_new_tokens=8).ids == mixed.ids
        with monkeypatch.context() as patch:
            patch.setattr(engine.library, "encode_each", None)  # none of them is lost, nor encoded again
            held.set()
            engine.flush()
            engine.library.store._later.flush()  # type: ignore[attr-defined]
            again = engine.generate(prompt, max_new_tokens=8).report
        assert not again.fallbacks and all(use.missing is None for use in again.chunks), "they have come meanwhile"


def test_a_part_of_a_chunk_is_weighed_against_the_whole_file(tmp_path: Path) -> None:
    """Loading takes as long, and less is saved by it."""
    with Engine(tiny_backbone(), store=tmp_path, memory_bytes=0, method="naive") as engine:
        engine.ensure(PASSAGES[:1])
        [entry] = engine.library.store.entries()
        for _ in range(9):
            engine.collections.cost.loaded(DISK, entry.nbytes, 1.0)  # as long as computing half of the chunk
            engine.collections.cost.computed(len(PASSAGES[0]), 2.0)
        whole = engine.prefill(f"{PASSAGES[0]}\n\nWho?").report.chunks
        part = engine.prefill(f"{PASSAGES[0][:80]}\n\nWho?").report.chunks
        twice = engine.prefill(f"{PASSAGES[0][:80]}\n\nWho?\n\n{PASSAGES[0][:80]}\n\nWho?").report.chunks
    assert [use.missing is None for use in (*whole, *part, *twice)] == [True, False, True, True]


def test_others_use_the_model_while_chunks_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request whose files take long holds up nobody, and has its chunks before its turn."""
    with Engine(tiny_backbone(), store=tmp_path) as engine:
        engine.ensure(PASSAGES)
    with Engine(engine.backbone, store=tmp_path) as engine:
        began, go_on, get = threading.Event(), threading.Event(), DiskStore.get

        def slow(self: DiskStore, key: str) -> ChunkKV | None:
            began.set()
            assert go_on.wait(60)
            return get(self, key)

        def other() -> int:
            assert began.wait(60)
            ids = engine.generate("Who drove the last train?", max_new_tokens=4).ids
            go_on.set()
            return len(ids)

        monkeypatch.setattr(DiskStore, "get", slow)
        answer, count = in_threads(lambda: engine.generate(prompt_of(engine, PASSAGES), max_new_tokens=4), other)
    assert count == 4 and answer.report.reused > 0 and not answer.report.fallbacks


def test_a_hint_loads_the_variants_that_the_prompt_will_take(tmp_path: Path) -> None:
    with Engine(tiny_backbone(), store=tmp_path) as engine:
        engine.ensure(PASSAGES)
        engine.fuse_in_order([PASSAGES])
    with Engine(engine.backbone, store=tmp_path) as engine:
        variants = engine.collections.of(engine.method.encode).variants
        fused = [variants.key(text, tuple(map(canonical, PASSAGES[:n]))) for n, text in enumerate(PASSAGES)]
        for text in PASSAGES[1:]:
            engine.library.get(engine.library.key(text))  # that they are there alone does not help
        assert not any(engine.library.at_hand(str(key)) for key in fused)
        engine.hint(PASSAGES, "Who drove the last train?")
        arrive(engine, [str(key) for key in fused])


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_what_is_forgotten_while_it_is_loaded_is_not_used(tmp_path: Path, memory_bytes: int) -> None:
    """Neither the chunk nor what was computed behind it."""
    with Engine(tiny_backbone(), store=tmp_path) as engine:
        engine.ensure(PASSAGES)
        engine.fuse_in_order([PASSAGES[:2]])
    with Engine(engine.backbone, store=tmp_path, memory_bytes=memory_bytes) as engine:
        request, report = request_of(engine, prompt_of(engine, PASSAGES[:2])), report_of(engine)
        reading = engine.prefiller.read(request, report)
        assert reading.loads is not None
        chunks = [future.result(60) for future in reading.loads.begun if future is not None]
        assert chunks[1] is not None and chunks[1].context == (canonical(PASSAGES[0]),)
        engine.forget(PASSAGES[:1])
        result = engine.prefiller(request, reading, report)
        assert [use.missing for use in report.chunks] == ["it was forgotten meanwhile", None]
        expected = engine.prefill(prompt_of(engine, PASSAGES[:2]), recompute_ratio=report.requested_ratio)
        assert expected.report.chunks[0].reused == report.chunks[1].reused
        assert torch.allclose(result.logits, expected.logits, atol=1e-4)


def test_from_disk_and_from_memory_the_answer_is_the_same(tmp_path: Path) -> None:
    answers = []
    for memory_bytes in (1 << 30, 0):
        with Engine(tiny_backbone(), store=tmp_path, memory_bytes=memory_bytes) as engine:
            engine.ensure(PASSAGES)
            engine.fuse_in_order([PASSAGES])
            answer = engine.generate(prompt_of(engine, PASSAGES), max_new_tokens=8)
            answers.append((answer.ids, answer.report.reused, answer.report.fallbacks))
    assert answers[0] == answers[1] and answers[0][1] > 0


def request_of(engine: Engine, prompt: str) -> Any:
    from cacheclip_rag.prefill.result import PrefillRequest

    return PrefillRequest(prompt, engine.method, engine.method.recompute_ratio)


def report_of(engine: Engine) -> Any:
    from cacheclip_rag.report import Report

    return Report(engine.method.name, engine.method.recompute_ratio)


def arrive(engine: Engine, keys: list[str]) -> None:
    """Wait until these chunks are in memory."""
    pause = threading.Event()
    for _ in range(6000):
        if all(engine.library.at_hand(key) for key in keys):
            return
        pause.wait(0.01)
    raise AssertionError("they were not loaded")
