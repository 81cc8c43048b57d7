"""Fused variants are made once, kept within a number, found by other processes, and forgotten with what they saw."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fused import FUSED, NAIVE, PREFIX, TAIL, A, B, C, D, contexts, engine, variant
from oracles import distance
from tiny import CONFIGS, PASSAGES, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine, PromptError
from cacheclip_rag.corpus.batches import TOGETHER
from cacheclip_rag.kv import variants as fusion_variants
from cacheclip_rag.kv.fit import LongestPath, Nearest
from cacheclip_rag.methods import resolve


def test_what_is_there_is_not_made_again_and_the_oldest_makes_room() -> None:
    ready = engine()
    ready.ensure(PASSAGES)
    seen: list[int] = []
    assert ready.fuse({A: [B], B: [A]}, seen.append).encoded == 2 and seen == [1, 2]
    assert ready.fuse({A: [B, B], B: [A], C: [A]}).encoded == 1  # a neighbour named twice counts once
    ready.fuse({A: [C]}, variants=2)
    ready.fuse({A: [D]}, variants=2)
    assert contexts(ready, A) == [(), (C,), (D,)]
    assert ready.library.key(A, (B,)) not in ready.library.store


def test_fewer_neighbours_than_wanted_and_none_at_all() -> None:
    ready = engine()
    ready.ensure([A, B])
    assert ready.fuse({A: [A], B: []}).encoded == 0  # itself is no context
    assert contexts(ready, A) == [()]


def test_a_company_that_exceeds_the_window_loses_its_last() -> None:
    backbone = tiny_backbone()
    backbone.context_length = len(PREFIX) + len(A) + len(B) + len(C)
    ready = engine(backbone)
    ready.ensure([A, B, C, D])
    ready.fuse({A: [B, C, D]})
    assert contexts(ready, A) == [(), (B, C)]


def test_strangers_are_left_out_and_reported() -> None:
    """Fusing must not bring back what was forgotten."""
    ready = engine()
    ready.ensure([A, B, C])
    ready.forget([C])
    result = ready.fuse({A: [C, B], C: [A]})
    assert contexts(ready, A) == [(), (B,)] and contexts(ready, C) == [()]
    assert [reason for _, reason in result.skipped] == ["the chunk is not known: ensure it first"]
    assert not ready.knows(C)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_chunks_are_fused_together_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = engine(tiny_backbone(kind)), engine(tiny_backbone(kind))
    behind = {A: [B, C, D], B: [C], C: [], D: [B, A], f" {B} ": [C]}  # the last is B again
    for ready in (together, alone):
        ready.ensure([A, B, C, D])
    for text, context in behind.items():
        alone.fuse({text: context})
    made: list[int] = []
    once = fusion_variants.fused
    monkeypatch.setattr(fusion_variants, "fused", lambda *args: made.append(len(args[2])) or once(*args))
    monkeypatch.setitem(TOGETHER, "cpu", 10_000)
    assert together.fuse(behind).encoded == 3 and made == [3]
    for text, context in {A: (B, C, D), B: (C,), D: (B, A)}.items():
        one, other = (variant(ready, text, context) for ready in (together, alone))
        assert one.context == other.context == context and one.position == other.position
        assert distance(one.keys, other.keys) < 1e-5 and distance(one.values, other.values) < 1e-5


def test_a_company_counts_where_it_is_decided_how_much_is_fused_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = engine()
    ready.ensure([A, B, C])
    made: list[int] = []
    once = fusion_variants.fused
    monkeypatch.setattr(fusion_variants, "fused", lambda *args: made.append(len(args[2])) or once(*args))
    monkeypatch.setitem(TOGETHER, "cpu", len(A) + len(B))
    ready.fuse({A: [C], B: [C]})
    assert made == [1, 1]


@pytest.mark.parametrize("error", [PromptError("no"), RuntimeError("no"), MemoryError("no")], ids=repr)
def test_one_chunk_that_fails_does_not_stop_the_others(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = engine()
    ready.ensure([A, B, C])
    once = fusion_variants.fused

    def failing(encoder: Any, backbone: Any, chunks: Any, *rest: Any) -> Any:
        if B in [chunk.text for chunk in chunks]:
            raise error
        return once(encoder, backbone, chunks, *rest)

    monkeypatch.setattr(fusion_variants, "fused", failing)
    result = ready.fuse({A: [B], B: [A], C: [A]})
    assert result.encoded == 2 and result.skipped == [(B[:40], "no")]
    assert contexts(ready, A) == [(), (B,)] and contexts(ready, B) == [()]


def test_a_model_that_cannot_be_composed_is_not_fused_and_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cacheclip_rag.model.backbone.obstacle_of", lambda model: "a strange model")
    ready = Engine(tiny_backbone(), method=FUSED, on_uncomposable="prefill")
    seen: list[int] = []
    assert ready.fuse({A: [B]}).skipped == [(A[:40], "a strange model")] and ready.fuse_used().skipped == []
    assert ready.fuse_in_order([[A, B]], seen.append).skipped == [(t[:40], "a strange model") for t in (A, B)]
    assert seen == [1]


def test_a_method_that_encodes_nothing_ahead_cannot_be_fused() -> None:
    ready = Engine(tiny_backbone(), method="cachecraft")
    assert ready.fuse({A: [B]}).skipped == [(A[:40], "cachecraft encodes nothing ahead")]
    assert ready.fuse_in_order([[A, B]]).skipped == [(t[:40], "cachecraft encodes nothing ahead") for t in (A, B)]
    with pytest.raises(ConfigurationError, match="encodes no chunk ahead"):
        resolve("cachecraft:fused=True")
    with pytest.raises(ConfigurationError, match="True, False, 'overlap', 'order', 'path'"):
        resolve("naive:fused=3")
    with pytest.raises(ConfigurationError, match="fused is one of"):
        resolve("naive", fused=[True])
    assert resolve("fusionrag:fused=False").fit is None and resolve("epic:fused=True").fit == Nearest()
    assert resolve("epic:fused=path").fit == resolve(resolve("epic:fused=path"), fused=True).fit == LongestPath()


def test_variants_are_found_again_and_by_other_processes(tmp_path: Path) -> None:
    first, second = engine(store=tmp_path), engine(store=tmp_path)
    first.ensure([A, B])
    first.fuse({B: [A]})
    prompt = PREFIX + A + B + TAIL
    want = first.prefill(prompt).logits
    assert torch.equal(second.prefill(prompt).logits, want)  # open all the while
    assert torch.equal(engine(store=tmp_path).prefill(prompt).logits, want)
    assert engine(store=tmp_path).fuse({B: [A]}).encoded == 0  # an interrupted run goes on


def test_a_variant_that_is_gone_costs_quality_and_not_the_answer() -> None:
    ready = engine()
    ready.ensure([A, B])
    ready.fuse({B: [A]})
    ready.library.store.delete([ready.library.key(B, (A,))])
    result = ready.prefill(PREFIX + A + B + TAIL)
    assert result.report.fallbacks == [] and result.report.chunks[1].reused == len(B)
    assert torch.equal(result.logits, ready.prefill(PREFIX + A + B + TAIL, method=NAIVE).logits)


def test_of_variants_that_are_gone_the_next_best_is_taken() -> None:
    ready = engine()
    ready.ensure([A, B, C])
    ready.fuse({C: [A, B]})
    ready.fuse({C: [A]})
    prompt = PREFIX + A + B + C + TAIL
    gone = [ready.library.key(C, context) for context in ((A, B), ())]  # what fits best, and the chunk by itself
    ready.library.store.delete(gone)
    result = ready.prefill(prompt)
    assert result.report.fallbacks == [] and result.report.chunks[2].reused == len(C)
    other = engine()
    other.ensure([A, B, C])
    other.fuse({C: [A]})
    assert torch.equal(result.logits, other.prefill(prompt).logits)
    ready.library.store.delete([ready.library.key(C, (A,))])
    [reason] = ready.prefill(prompt).report.fallbacks
    assert "gone" in reason


def test_a_fit_that_chooses_what_there_is_not_ends_in_prefill() -> None:
    @dataclasses.dataclass(frozen=True)
    class Stubborn:
        def choose(self, contexts: list[tuple[str, ...]], before: list[str]) -> tuple[str, ...]:
            return ("nobody",)

    ready = engine()
    ready.ensure([A, B])
    prompt = PREFIX + A + B + TAIL
    result = ready.prefill(prompt, method=dataclasses.replace(FUSED, fit=Stubborn()))
    assert result.report.fallbacks and torch.equal(result.logits, ready.prefill(prompt, method="full").logits)


def test_forgetting_a_chunk_forgets_all_that_was_fused_with_it(tmp_path: Path) -> None:
    ready, other = engine(store=tmp_path), engine(store=tmp_path)
    ready.ensure([A, B, C, D])
    other.prefill(PREFIX + A + TAIL)
    ready.fuse({A: [B], B: [C], C: [D, A], D: [C]})
    other.forget([A])  # the other process has not fused anything itself
    assert {(e.text, e.context) for e in engine(store=tmp_path).library.store.entries()} == {
        (B, ()),
        (C, ()),
        (D, ()),
        (B, (C,)),
        (D, (C,)),
    }
    assert not any(A.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert ready.prefill(PREFIX + B + C + TAIL).report.fallbacks == []


def test_tenants_share_no_fused_kv(tmp_path: Path) -> None:
    one, two = engine(store=tmp_path, tenant="one"), engine(store=tmp_path, tenant="two")
    one.ensure([A, B])
    two.ensure([A, B])
    one.fuse({B: [A]})
    assert contexts(one, B) == [(), (A,)] and contexts(two, B) == [()]
    assert one.library.key(B, (A,)) != two.library.key(B, (A,))


@pytest.mark.parametrize("victim", [A, B], ids=["neighbour", "the chunk itself"])
def test_what_another_process_forgets_while_it_is_fused_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    ready, other = engine(store=tmp_path), engine(store=tmp_path)
    ready.ensure([A, B])

    compute = fusion_variants.fused

    def meanwhile(*arguments: Any) -> Any:
        made = compute(*arguments)
        other.forget([victim])
        return made

    monkeypatch.setattr(fusion_variants, "fused", meanwhile)
    result = ready.fuse({B: [A]})
    assert result.encoded == 0 and "forgotten meanwhile" in result.skipped[0][1]
    ready.ensure([A, B])
    result = ready.fuse_in_order([[A, B]])
    assert result.encoded == 0 and "forgotten meanwhile" in result.skipped[0][1]
    monkeypatch.undo()
    assert not any(entry.context for entry in engine(store=tmp_path).library.store.entries())


def test_chunks_without_a_known_neighbour_are_said_not_to_be_fused() -> None:
    ready = engine()
    ready.ensure([A, B])
    result = ready.fuse({A: [C], B: [C, A]})
    assert result.encoded == 1 and [reason for _, reason in result.skipped] == [
        "none of its neighbours is known: ensure them first"
    ]
    assert ready.fused(A) == [] and ready.fused(B) == [(A,)] and ready.fused(C) == []
    assert ready.fuse({A: []}).skipped == []  # a corpus of one


@pytest.mark.parametrize(
    "wrong", [[A, B], {A: B}, {A: None}, {A: 3}], ids=["no mapping", "one text", "nothing", "no texts"]
)
def test_neighbours_that_are_none_are_refused(wrong: Any) -> None:
    ready = engine()
    ready.ensure([A, B])
    with pytest.raises(ConfigurationError, match=r"\[(neighbour|text)"):
        ready.fuse(wrong)
    assert ready.fused(A) == []


def test_sequences_that_are_texts_are_refused() -> None:
    ready = engine()
    ready.ensure([A, B])
    for wrong in ([A, B], A):
        with pytest.raises(ConfigurationError, match="several texts"):
            ready.fuse_in_order(wrong)


def test_a_store_that_is_too_small_for_fusing_is_said_to_be(tmp_path: Path) -> None:
    with engine(store=tmp_path / "measured") as measured:
        measured.ensure([A, B])
        size = sum(entry.nbytes for entry in measured.library.store.entries())
    ready = engine(store=tmp_path / "small", memory_bytes=1, disk_bytes=int(size * 1.3))
    ready.ensure([A, B])
    result = ready.fuse({B: [A], A: [B]})
    assert result.encoded == 0 and all("disk_bytes" in reason for _, reason in result.skipped)


def test_what_another_machine_fused_is_fetched_from_the_remote(tmp_path: Path) -> None:
    remote = f"file://{tmp_path / 'remote'}"
    with engine(store=tmp_path / "one", remote=remote) as first:
        first.ensure([A, B])
        assert first.fuse({B: [A]}).encoded == 1
    with engine(store=tmp_path / "two", remote=remote) as second:
        second.ensure([A, B])
        assert second.fused(B) == []
        assert second.fuse({B: [A]}).encoded == 0 and second.fused(B) == [(A,)]
        prompt = PREFIX + A + B + TAIL
        assert distance(second.prefill(prompt).logits, second.prefill(prompt, method="full").logits) < 1e-4


def test_a_variant_that_is_gone_is_made_again() -> None:
    ready = engine()
    ready.ensure([A, B])
    ready.fuse({B: [A]})
    ready.library.store.delete([ready.library.key(B, (A,))])
    assert ready.fuse({B: [A]}).encoded == 1 and ready.fuse({B: [A]}).encoded == 0
    assert variant(ready, B, (A,)).context == (A,)


def test_of_too_many_variants_the_one_unused_for_longest_goes_after_a_restart(tmp_path: Path) -> None:
    texts = PASSAGES[:5]
    with engine(store=tmp_path) as first:
        first.ensure(texts)
        for number, other in enumerate(texts[1:4]):
            first.fuse({texts[0]: [other]})
            [new] = [e for e in first.library.store.entries() if e.context == (other,)]
            [path] = tmp_path.rglob(f"{new.key}.safetensors")
            os.utime(path, (1_000 - number, 1_000 - number))  # what came last was used least recently
    with engine(store=tmp_path) as again:
        again.fuse({texts[0]: [texts[4]]}, variants=3)
        assert set(contexts(again, texts[0])) == {(), (texts[1],), (texts[2],), (texts[4],)}
