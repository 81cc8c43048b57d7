"""What fused KV is, on tiny random models: right in its own context, and which variant a prompt gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from fused import FUSED, NAIVE, PREFIX, TAIL, A, B, C, D, E, contexts, engine, ids, taken, variant
from oracles import distance, own
from tiny import CONFIGS, tiny_backbone

from cacheclip_rag import ConfigurationError, Engine
from cacheclip_rag.kv.encode import disorder
from cacheclip_rag.kv.fit import LongestPath, Nearest, Ordered, context_fit, context_overlap
from cacheclip_rag.methods import resolve


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_fused_behind_one_chunk_is_what_a_full_prefill_of_both_gives(kind: str) -> None:
    """One hop is exact for one neighbour: its own KV behind the prefix is right."""
    ready = engine(tiny_backbone(kind))
    ready.ensure([A, B])
    assert ready.fuse({B: [A]}).encoded == 1
    chunk, whole = variant(ready, B, (A,)), own(kind, ids(PREFIX, A, B))
    start = len(PREFIX) + len(A)
    assert chunk.position == start and chunk.context == (A,) and torch.equal(chunk.ids, ids(B))
    assert distance(chunk.keys, whole.keys[:, :, start:]) < 1e-4
    assert distance(chunk.values, whole.values[:, :, start:]) < 1e-4


def test_neighbours_stand_in_order_with_their_own_kv() -> None:
    """Two neighbours: the second does not see the first, and their positions are contiguous (transformers' oracle)."""
    ready = engine()
    ready.ensure([A, B, C])
    ready.fuse({C: [A, B]})
    chunk = variant(ready, C, (A, B))
    text, p, a, b = ids(PREFIX, A, B, C), len(PREFIX), len(A), len(B)
    first, second = own("llama", ids(PREFIX, A)), own("llama", ids(PREFIX, B))
    model = tiny_backbone()
    moved = model.rotary.rotate(second.keys[:, :, p:], a)
    keys = torch.cat([first.keys, moved], dim=2)
    values = torch.cat([first.values, second.values[:, :, p:]], dim=2)
    canvas = model.canvas(len(text))
    canvas.write(0, keys, values)
    rows = torch.arange(p + a + b, len(text))
    model.forward(text[rows], rows, canvas, logits=0)
    want = canvas.read(slice(p + a + b, len(text)))
    assert distance(chunk.keys, want[0]) < 1e-4 and distance(chunk.values, want[1]) < 1e-4
    other = engine()
    other.ensure([A, B, C])
    other.fuse({C: [B, A]})
    assert distance(variant(other, C, (B, A)).keys, want[0]) > 1e-2


def test_a_prompt_in_the_company_of_fusion_is_exact_without_recompute() -> None:
    ready, prompt = engine(), PREFIX + A + B + TAIL
    ready.ensure([A, B])
    full = ready.prefill(prompt, method="full").logits
    assert distance(ready.prefill(prompt).logits, full) > 1e-2
    ready.fuse({B: [A]})
    result = ready.prefill(prompt)
    assert distance(result.logits, full) < 1e-4
    assert result.report.fallbacks == [] and [use.in_place for use in result.report.chunks] == [True, False]
    # Without fusion's leave, methods take what a chunk is by itself.
    assert distance(ready.prefill(prompt, method=NAIVE).logits, full) > 1e-2


@pytest.mark.parametrize("method", ["cacheblend", "query_guided", "fusionrag", "droidspeak", "psr", "epic", "link0"])
def test_every_way_of_encoding_can_be_fused_and_ratio_one_is_full_prefill(method: str) -> None:
    ready = Engine(tiny_backbone(), method=resolve(method, fused=True))
    ready.ensure([A, B, C])
    assert ready.fuse({B: [A], C: [A, B]}).encoded == 2
    prompt = ready.backbone.shared_prefix() + "\n\n".join([A, B, C]) + TAIL
    full = ready.prefill(prompt, method="full").logits
    result = ready.prefill(prompt, recompute_ratio=0.5 if ready.method.recompute_ratio else None)
    assert result.report.fallbacks == []
    assert taken(ready, A, B, C) == [(), (A,), (A, B)]
    if ready.method.recompute_ratio:
        assert distance(ready.prefill(prompt, recompute_ratio=1.0).logits, full) < 1e-4


def test_the_variant_with_most_in_common_with_what_stands_in_front_is_taken() -> None:
    choose = Nearest().choose
    assert choose([(), (A,), (A, B), (C, D)], [A, B]) == (A, B)
    assert choose([(), (A,), (A, B), (C, D)], [D, E]) == (C, D)
    assert choose([(), (A,), (A, B)], []) == ()  # nothing in front: the chunk by itself
    assert choose([(), (A,), (B,)], [E]) == (B,)  # a stranger's context still beats none; of equals the newest
    assert choose([()], [A]) == ()
    assert (
        context_overlap([A, B], [B, C]) == pytest.approx(1 / 3)
        and context_overlap([], []) == 1.0
        and context_overlap([], [A]) == 0.0
    )


def test_order_counts_against_a_variant_where_it_is_asked_to() -> None:
    turned, kept, alone = (C, B, A), (A, B, D), ()
    before = [A, B, C]
    assert Nearest().choose([alone, turned, kept], before) == turned  # all of them, whatever the order
    assert Ordered().choose([alone, turned, kept], before) == kept  # two of three, in order
    assert Ordered().choose([alone, (B, A, C), (A, D)], before) == (B, A, C)  # one pair of three: 2/3 against 1/4
    assert Ordered().choose([alone, (A,)], []) == alone and Ordered().choose([alone, (D,)], [A]) == (D,)
    assert (
        context_fit((), []) == 1.0
        and context_fit((), [A]) == 0.0
        and context_fit((A,), [B]) == 0.5
        and context_fit((A,), [A]) == 1.0
    )
    assert context_fit((A, B), [A]) == 0.75 and context_fit((A,), []) == 0.5
    assert disorder([A, B, C], [C, B, A]) == 1.0 and disorder([A, B], [B]) == disorder([], [A]) == 0.0
    assert disorder([A, B, C], [B, D, A, C]) == pytest.approx(1 / 3)
    assert resolve("epic:fused=order").fit == Ordered()


def test_what_stands_in_front_is_what_the_prompt_says() -> None:
    ready = engine()
    ready.ensure([A, B, C])
    ready.fuse({C: [A], B: [C]})
    ready.fuse({C: [B]})
    assert taken(ready, A, C) == [(), (A,)] and taken(ready, B, C) == [(), (B,)]
    assert taken(ready, C, B, C) == [(), (C,), (B,)]  # twice in one prompt, each time in its place


def test_a_fused_chunk_right_behind_the_prefix_is_not_taken_for_exact() -> None:
    """Its KV has seen others; only the chunk by itself is right there, whatever a rule chooses."""

    @dataclasses.dataclass(frozen=True)
    class Last:
        def choose(self, contexts: Any, before: Any) -> Any:
            return contexts[-1]

    ready, prompt = engine(), PREFIX + B + TAIL
    ready.ensure([A, B])
    ready.fuse({B: [A]})
    stubborn = dataclasses.replace(FUSED, fit=Last())
    (alone,), (behind,) = ready.prefill(prompt).report.chunks, ready.prefill(prompt, method=stubborn).report.chunks
    assert alone.in_place and not behind.in_place


def test_a_sequence_that_comes_again_is_exact_without_recompute() -> None:
    """Three chunks, each behind all before it: that one hop could not do."""
    ready, prompt = engine(), PREFIX + A + B + C + TAIL
    ready.ensure([A, B, C])
    full = ready.prefill(prompt, method="full").logits
    ready.fuse({B: [A], C: [A, B]})
    one_hop = distance(ready.prefill(prompt).logits, full)
    assert one_hop > 1e-3
    assert ready.fuse_in_order([[A, B, C]]).encoded == 2
    assert distance(ready.prefill(prompt).logits, full) < 1e-4
    assert contexts(ready, C) == [(), (A, B)]  # it took the other's place
    assert ready.library.key(C, (A, B)) not in ready.library.store
    assert ready.fuse_in_order([[A, B, C], [A]]).encoded == 0


def test_a_sequence_whose_kv_is_gone_is_computed_again_and_kept() -> None:
    ready = engine()
    ready.ensure([A, B])
    assert ready.fuse_in_order([[A, B]]).encoded == 1
    key = ready.library.key(B, (A,), in_sequence=True)
    ready.library.store.delete([key])
    assert ready.fuse_in_order([[A, B]]).encoded == 1 and key in ready.library.store
    assert variant(ready, B, (A,)).context == (A,)


def test_sequences_share_what_they_have_in_common_and_know_no_strangers(tmp_path: Path) -> None:
    ready = engine(store=tmp_path)
    ready.ensure([A, B, C])
    result = ready.fuse_in_order([[A, B], [A, B, C], [D, A, B]])
    assert result.encoded == 2 and [reason for _, reason in result.skipped] == [
        "the chunk is not known: ensure it first"
    ]
    again = engine(store=tmp_path)
    assert contexts(again, C) == [(), (A, B)]
    (entry,) = [e for e in again.library.store.entries() if e.text == C and e.context]
    assert entry.in_sequence and again.library.get(entry.key).in_sequence
    again.forget([A])
    assert contexts(again, C) == [()]


def test_the_longest_path_drops_chunks_from_the_front() -> None:
    choose = LongestPath().choose
    assert choose([(), (B,), (A, B)], [A, B]) == (A, B)
    assert choose([(), (B,), (A, B)], [C, B]) == (B,)
    assert choose([(), (A,), (A, B)], [A, C]) == () and choose([(), (A,)], []) == ()


def test_the_ratio_falls_with_the_fit_of_the_variants() -> None:
    ready = Engine(tiny_backbone(), method=resolve("query_guided:fused=True,recompute_ratio=0.4,fitted_ratio=0.0"))
    ready.ensure([A, B, C, D])
    prompt = ready.backbone.shared_prefix() + "\n\n".join([A, B, C]) + TAIL

    def answered(**options: Any) -> Any:
        return ready.prefill(prompt, **options).report

    both = len(B + C)  # A is in place: right behind the prefix it was computed behind
    alone = answered()
    assert alone.fit == 0.0 and alone.requested_ratio == 0.4 and alone.recomputed == int(0.4 * both)
    ready.fuse({C: [D]})  # a stranger's context counts half
    half = answered()
    assert half.fit == pytest.approx(len(C) / 2 / both, abs=1e-3) and half.ratio < alone.ratio
    ready.fuse({B: [A]})
    better = answered()
    assert better.fit == pytest.approx((len(B) + len(C) / 2) / both, abs=1e-3)
    assert better.ratio < half.ratio
    ready.fuse_in_order([[A, B, C]])
    assert answered().fit == pytest.approx(1.0) and answered().recomputed == 0
    # Who asks for a ratio gets it.
    asked = answered(recompute_ratio=0.3)
    assert asked.requested_ratio == 0.3 and asked.fit is None and asked.recomputed > 0
    with pytest.raises(ConfigurationError, match="from 0"):
        resolve("naive:fitted_ratio=2.0")
