"""What a prompt's chunks are worth in idle time: from its first use on, in its order, and only in room to spare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused import PREFIX, TAIL, A, B, C, D, E, contexts, engine, ids, variant
from oracles import distance, own
from tiny import tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.corpus import corpus as corpus_module
from cacheclip_rag.corpus import fusing
from cacheclip_rag.kv import variants as fusion_variants
from cacheclip_rag.store import MemoryStore


def ask(ready: Engine, *texts: str, **options: Any) -> Any:
    return ready.prefill(PREFIX + "".join(texts) + TAIL, **options)


def idle(*texts: str, **options: Any) -> Engine:
    ready = engine(fuse_when_idle=True, **options)
    ready.ensure(texts)
    return ready


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The texts of each chunk that is fused from now on: its context, then its own."""
    made: list[tuple[str, ...]] = []
    once = fusion_variants.fused

    def noting(encoder: Any, backbone: Any, chunks: Any, context: Any, prefix: Any) -> Any:
        made.extend((*(c.text for c in behind), chunk.text) for chunk, behind in zip(chunks, context, strict=True))
        return once(encoder, backbone, chunks, context, prefix)

    monkeypatch.setattr(fusion_variants, "fused", noting)
    return made


def test_the_first_question_helps_the_second() -> None:
    with idle(A, B, C) as ready:
        full = ask(ready, A, B, C, method="full").logits
        first = distance(ask(ready, A, B, C).logits, full)
        ready.flush()
        assert contexts(ready, B) == [(), (A,)] and contexts(ready, C) == [(), (A, B)]
        assert first > 1e-2 and distance(ask(ready, A, B, C).logits, full) < 1e-4


def test_it_is_a_full_prefill_of_the_chunks_and_no_copy_of_the_repaired_prompt() -> None:
    with idle(A, B, C) as ready:
        ask(ready, A, B, C, method="naive:fused=True", recompute_ratio=0.0)
        ready.flush()
        whole, start = own("llama", ids(PREFIX, A, B, C)), len(PREFIX) + len(A) + len(B)
        chunk = variant(ready, C, (A, B))
        assert distance(chunk.keys, whole.keys[:, :, start:]) < 1e-4
        assert distance(chunk.values, whole.values[:, :, start:]) < 1e-4


def test_a_company_is_computed_once(computed: list[tuple[str, ...]]) -> None:
    with idle(A, B, C, D) as ready:
        for _ in range(2):
            ask(ready, A, B, C)
            ready.flush()
        assert computed[:2] == [(A, B), (A, B, C)] and (A, B, C) not in computed[2:]
        del computed[:]
        ask(ready, A, B, D)
        ready.flush()
        assert [made for made in computed if made[-1] == D] == [(A, B, D)] and (A, B) not in computed


def test_a_chunk_alone_has_no_company(computed: list[tuple[str, ...]]) -> None:
    with idle(A) as ready:
        ask(ready, A)
        ready.flush()
        assert computed == []


@pytest.mark.parametrize("victim", [A, B, C])
def test_forgetting_any_chunk_of_it_removes_what_was_computed_behind_it(victim: str, tmp_path: Path) -> None:
    with idle(A, B, C, store=tmp_path) as ready:
        ask(ready, A, B, C)
        ready.flush()
        ready.forget([victim])
        left = {entry for text in (A, B, C) for entry in ready.fused(text)}
        assert not any(victim in context for context in left) and contexts(ready, victim) == [()]
        assert not any(victim.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("again", [False, True], ids=["for good", "and stored again"])
def test_a_chunk_that_is_forgotten_meanwhile_ends_it(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, ...]], again: bool
) -> None:
    with idle(A, B, C) as ready:
        rests, asked = ready.corpus.rests, []

        def forgetting() -> bool:
            asked.append(None)
            if len(asked) == 3:  # A is loaded, B computed behind it
                ready.forget([A])
                ready.ensure([A] if again else [])
            return rests()

        monkeypatch.setattr(ready.corpus, "rests", forgetting)
        ask(ready, A, B, C)
        ready.flush()
        assert computed == [(A, B)] and len(asked) == 3
        assert contexts(ready, B) == contexts(ready, C) == [()] and ready.knows(A) == again


def test_without_one_of_its_chunks_it_would_be_another_company(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, ...]]
) -> None:
    with idle(A, B, C) as ready:
        rests = ready.corpus.rests

        def evicting() -> bool:
            ready.library.store.delete([ready.library.key(B)])
            return rests()

        monkeypatch.setattr(ready.corpus, "rests", evicting)
        ask(ready, A, B, C)
        ready.flush()
        assert computed == []


def test_a_chunk_whose_kv_is_missing_is_encoded_first(computed: list[tuple[str, ...]]) -> None:
    with idle(A, B, C) as ready:
        ready.library.store.delete([ready.library.key(B)])
        ask(ready, A, B, C)
        ready.flush()
        assert computed == [(A, B), (A, B, C)]


def test_requests_go_first_also_between_two_chunks(
    monkeypatch: pytest.MonkeyPatch, computed: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(corpus_module, "_WAIT", 0.05)
    with idle(A, B, C) as ready:
        place, rests, asked = ready.limit.place(), ready.corpus.rests, []

        def arriving() -> bool:
            asked.append(None)
            if len(asked) == 3:
                place.take()  # a request comes in, and stays for longer than is waited
            return rests()

        monkeypatch.setattr(ready.corpus, "rests", arriving)
        ask(ready, A, B, C)
        ready.flush()
        assert computed == [(A, B)]
        place.release()
        ask(ready, A, B, C)
        ready.flush()
        assert (A, B, C) in computed and computed.count((A, B)) == 1  # it goes on where it was


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_where_there_is_no_room_nothing_is_computed_and_nothing_evicted(
    where: str, tmp_path: Path, computed: list[tuple[str, ...]]
) -> None:
    with idle(A, B, C, store=None if where == "memory" else tmp_path / "measured") as ready:
        stats = ready.stats().store
    size = int(1.2 * stats.nbytes)
    small = {"memory_bytes": size} if where == "memory" else {"store": tmp_path / "small", "disk_bytes": size}
    with idle(A, B, C, **small) as ready:
        ask(ready, A, B, C)
        ready.flush()
        assert computed == [] and ready.stats().store.evicted == 0
        assert all(contexts(ready, text) == [()] for text in (A, B, C))


def test_contexts_seen_once_never_push_out_others_and_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "FUSED_AT", ())
    with idle(A, B, C, D, E) as ready:
        ready.fuse({E: [A]})
        ready.fuse({E: [B]})
        ask(ready, C, E)
        ready.flush()
        assert set(contexts(ready, E)) == {(), (A,), (B,), (C,)}
        ask(ready, D, E)
        ready.flush()
        assert set(contexts(ready, E)) == {(), (A,), (B,), (D,)}
        ready.fuse({E: [C]})
        assert set(contexts(ready, E)) == {(), (A,), (B,), (C,)}
        ask(ready, D, E)
        ready.flush()
        assert set(contexts(ready, E)) == {(), (A,), (B,), (C,)}


def test_a_context_that_came_again_is_one_like_the_others() -> None:
    with idle(A, B, C, D, E) as ready:
        for _ in range(2):
            ask(ready, C, E)
            ready.flush()
        ready.fuse({E: [A]})
        ready.fuse({E: [B]})
        ask(ready, D, E)
        ready.flush()
        assert set(contexts(ready, E)) == {(), (A,), (B,), (C,)}


def test_a_context_that_is_asked_for_is_one_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "FUSED_AT", ())
    with idle(A, B, C, D, E) as ready:
        ask(ready, C, E)
        ready.flush()
        assert ready.fuse_in_order([[C, E]]).encoded == 0  # it is there, and stays
        ready.fuse({E: [A]})
        ready.fuse({E: [B]})
        ask(ready, D, E)
        ready.flush()
        assert set(contexts(ready, E)) == {(), (A,), (B,), (C,)}


def test_chunks_behind_one_with_enough_variants_are_computed_behind_it_all_the_same() -> None:
    with idle(A, B, C, D, E) as ready:
        for other in (C, D, E):
            ready.fuse({B: [other]})
        ask(ready, A, B, C)
        ready.flush()
        assert (A,) not in contexts(ready, B) and contexts(ready, C) == [(), (A, B)]
        whole, start = own("llama", ids(PREFIX, A, B, C)), len(PREFIX) + len(A) + len(B)
        assert distance(variant(ready, C, (A, B)).keys, whole.keys[:, :, start:]) < 1e-4


def test_a_failure_in_idle_time_is_logged_and_the_next_prompt_is_answered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with idle(A, B) as ready:
        wanted = ask(ready, A, B, method="naive").logits

        def broken(*_: Any) -> Any:
            raise RuntimeError("no memory left")

        monkeypatch.setattr(fusion_variants, "fused", broken)
        ask(ready, A, B)
        ready.flush()
        assert "no memory left" in caplog.text
        assert torch.equal(ask(ready, A, B).logits, wanted)


def test_another_process_finds_what_was_computed(tmp_path: Path) -> None:
    with idle(A, B, store=tmp_path) as ready, engine(tiny_backbone(), store=tmp_path) as other:
        ask(ready, A, B)
        ready.flush()
        assert distance(ask(other, A, B).logits, ask(ready, A, B, method="full").logits) < 1e-4


def test_a_store_that_refuses_ends_it(computed: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryStore, "put_spare", lambda store, key, chunk: False)
    with idle(A, B, C, D) as ready:
        ask(ready, A, B, C, D)
        ready.flush()
    assert len(computed) == 1, "what stands behind a chunk that cannot be kept is not computed"
