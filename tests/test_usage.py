"""Counts of which chunks come together, and what is fused from them."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
from fused import NAIVE, PREFIX, TAIL, A, B, C, D, contexts, engine

from cacheclip_rag.corpus.usage import Usage


def test_usage_counts_who_is_met_and_where() -> None:
    usage = Usage()
    for names in (["a", "b", "c"], ["b", "a"], ["c", "a", "b"], ["b", "b"]):
        usage.note(names)
    assert [usage.uses(name) for name in "abcd"] == [3, 4, 2, 0]
    # Met a: b three times, once in front (3 * 2/5), c twice, once in front (2 * 1/2).
    assert (
        usage.expected_context("a", 5) == ["b", "c"]
        and usage.expected_context("b", 1) == ["a"]
        and usage.expected_context("d", 3) == []
    )
    assert usage.hot(3) == ["b", "a"] and usage.hot(9) == []
    usage.forget(["b"])
    assert usage.expected_context("a", 5) == ["c"] and usage.hot(1) == ["a", "c"]


def test_who_stood_behind_may_come_in_front_unless_the_order_is_fixed() -> None:
    usage = Usage()
    usage.note(["a", "b", "c"])
    # All were met once: those in front are expected there with 2/3, those behind with 1/3.
    assert usage.expected_context("a", 5) == ["b", "c"] and usage.expected_context("b", 5) == ["a", "c"]
    usage.note(["a", "b"])
    assert usage.expected_context("a", 5) == ["c"] and usage.expected_context("b", 5) == [
        "a",
        "c",
    ]  # b came behind a both times
    usage.note(["b", "a"])
    assert usage.expected_context("a", 5) == ["b", "c"]  # 3 * 2/5 and 1 * 1/3


def test_usage_is_bounded_and_keeps_what_counts(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    usage = Usage(path, chunks=10, companions=4)
    for number in range(200):
        usage.note(["often", f"once {number}", "hub"])
    usage.save()
    seen = json.loads(path.read_text())["seen"]
    assert len(seen) == 10 and max(map(len, seen.values())) <= 2 * 4 + 1
    assert len(usage.hot(1)) == 10
    assert usage.uses("hub") == usage.uses("often") == 200 and usage.expected_context("hub", 1) == ["often"]


def test_usage_of_two_processes_adds_up_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "usage.json"
    one, two = Usage(path), Usage(path)
    one.note(["a", "b"])
    two.note(["a", "b"])
    two.note(["c"])
    one.save(), two.save(), one.save()
    again = Usage(path)
    assert [again.uses(name) for name in "abc"] == [2, 2, 1] and again.expected_context("b", 3) == ["a"]
    two.forget(["a"])
    assert Usage(path).expected_context("b", 3) == [] and '"a"' not in path.read_text()
    path.write_text("{damaged")
    assert Usage(path).hot(1) == []
    one.note(["a"])
    one.save()
    assert Usage(path).uses("a") == 1
    Usage(tmp_path / "absent" / "usage.json").forget(["a"])  # what cannot be kept is not missed


@pytest.mark.parametrize("count", ["1e999", "Infinity", "-2", "1" * 400, "1.5", "true", '"3"'])
def test_a_usage_file_that_cannot_be_true_is_not_read(tmp_path: Path, count: str) -> None:
    path = tmp_path / "usage.json"
    kept = Usage(path)
    kept.note(["a", "b"])
    kept.save()
    path.write_text(path.read_text().replace('"a": 1', f'"a": {count}', 1))
    again = Usage(path)
    assert again.hot(1) == [] and again.expected_context("b", 3) == []


def test_counts_that_cannot_be_kept_are_not_tried_at_every_prompt(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    usage = Usage(tmp_path / "file" / "usage.json")
    asked = [usage.note(["a", str(number)]) for number in range(64)]
    assert asked == [False] * 63 + [True]
    usage.save()
    assert [usage.note(["a"]) for _ in range(64)].count(True) == 1


def test_chunks_are_fused_with_those_they_come_with(tmp_path: Path) -> None:
    ready = engine(store=tmp_path)
    ready.ensure([A, B, C, D])
    for texts in ([A, B, C], [A, C], [D]):
        ready.prefill(PREFIX + "\n".join(texts) + TAIL)
    assert ready.fuse_used().encoded == 2  # B and D came once; C was behind A twice, and B once
    assert contexts(ready, C) == [(), (A, B)] and contexts(ready, A) == [(), (B,)]
    ready.close()
    again = engine(store=tmp_path)
    assert again.fuse_used(least=1).encoded == 1 and contexts(again, B) == [(), (A, C)]
    again.forget([A])
    assert again.usage.expected_context(again.library.key(B), 9) == [again.library.key(C)]


def test_counts_of_an_engine_that_was_never_closed_are_kept(tmp_path: Path) -> None:
    """It was dropped, or its process ended, before there was enough to save."""
    ready = engine(store=tmp_path)
    ready.ensure([A, B])
    for _ in range(2):
        ready.prefill(PREFIX + A + B + TAIL)
    del ready
    gc.collect()
    assert engine(store=tmp_path).fuse_used().encoded == 1


def test_idle_time_is_used_to_fuse_when_allowed() -> None:
    allowed, not_allowed = engine(fuse_when_idle=True), engine()
    for ready in (allowed, not_allowed):
        ready.ensure([A, B])
        for _ in range(2):
            ready.generate(PREFIX + A + B + TAIL, max_new_tokens=1)
        ready.flush()
    assert contexts(allowed, B) == [(), (A,)] and contexts(not_allowed, B) == [()]
    ready = engine(fuse_when_idle=True)
    ready.ensure([A, B])
    for _ in range(2):
        ready.generate(PREFIX + A + B + TAIL, max_new_tokens=1, method=NAIVE)  # which takes no fused KV
    ready.flush()
    assert contexts(ready, B) == [()]
