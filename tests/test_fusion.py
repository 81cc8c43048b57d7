"""Fused KV: what it is, which prompt gets it, and that nothing of it outlives its context. On tiny random models."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import json
import os
import pickle
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cacheclip_eval import Item, Passage, access, run
from cacheclip_eval.contexts import meeting
from cacheclip_eval.systems import parse
from oracles import distance, own, watch
from tiny import CONFIGS, PASSAGES, tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Backbone, ConfigurationError, Engine, PromptError
from cacheclip_rag.cli import main as cli
from cacheclip_rag.cli import store as store_cli
from cacheclip_rag.corpus.batches import TOGETHER
from cacheclip_rag.corpus.neighbours import Neighbourhood, similar
from cacheclip_rag.corpus.usage import Usage
from cacheclip_rag.frameworks.fuser import Fuser
from cacheclip_rag.kv import variants as fusion_variants
from cacheclip_rag.kv.encode import disorder
from cacheclip_rag.kv.fit import LongestPath, Nearest, Ordered, context_fit, context_overlap
from cacheclip_rag.methods import resolve

_spec = spec_from_file_location("paths", Path(__file__).parent.parent / "benchmarks" / "paths.py")
assert _spec is not None and _spec.loader is not None
paths = module_from_spec(_spec)
sys.modules["paths"] = paths  # where its dataclasses look themselves up
_spec.loader.exec_module(paths)

A, B, C, D, E = PASSAGES
PREFIX = "Read these passages.\n"
TAIL = "\n\nWho drove the last train?"
NAIVE = resolve("naive", prefix=PREFIX)
FUSED = resolve(NAIVE, fused=True)


def engine(backbone: Backbone | None = None, **options: Any) -> Engine:
    return Engine(backbone or tiny_backbone(), method=FUSED, prefix=PREFIX, **options)


def variants(engine: Engine) -> Any:
    return engine.collections.of(engine.method.encode).variants


def ids(*texts: str) -> torch.Tensor:
    return torch.cat([tiny_backbone().tokenise(text).ids for text in texts])


# ---- what it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_fused_behind_one_chunk_is_what_a_full_prefill_of_both_gives(kind: str) -> None:
    """One hop is exact for one neighbour: its own KV behind the prefix is right."""
    ready = engine(tiny_backbone(kind))
    ready.ensure([A, B])
    assert ready.fuse({B: [A]}).encoded == 1
    chunk, whole = variants(ready).get(B, (A,)), own(kind, ids(PREFIX, A, B))
    start = len(PREFIX) + len(A)
    assert chunk.position == start and chunk.context == (A,) and torch.equal(chunk.ids, ids(B))
    assert distance(chunk.keys, whole.keys[:, :, start:]) < 1e-4
    assert distance(chunk.values, whole.values[:, :, start:]) < 1e-4


def test_neighbours_stand_in_order_with_their_own_kv() -> None:
    """Two neighbours: the second does not see the first, and their positions are contiguous (transformers' oracle)."""
    ready = engine()
    ready.ensure([A, B, C])
    ready.fuse({C: [A, B]})
    chunk = variants(ready).get(C, (A, B))
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
    assert distance(variants(other).get(C, (B, A)).keys, want[0]) > 1e-2


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
    assert contexts(ready, A, B, C) == [(), (A,), (A, B)]
    if ready.method.recompute_ratio:
        assert distance(ready.prefill(prompt, recompute_ratio=1.0).logits, full) < 1e-4


def contexts(engine: Engine, *texts: str) -> list[tuple[str, ...] | None]:
    """Of the chunks that are placed for a prompt of these texts: behind which chunks each was computed."""
    _, request, _ = watch(engine, engine.method, engine.backbone.shared_prefix() + "\n\n".join(texts) + TAIL)
    return [chunk and chunk.context for chunk in request.chunks]


# ---- which variant -------------------------------------------------------------------------------------------------


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
    assert contexts(ready, A, C) == [(), (A,)] and contexts(ready, B, C) == [(), (B,)]
    assert contexts(ready, C, B, C) == [(), (C,), (B,)]  # twice in one prompt, each time in its place


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


# ---- making --------------------------------------------------------------------------------------------------------


def test_what_is_there_is_not_made_again_and_the_oldest_makes_room() -> None:
    ready = engine()
    ready.ensure(PASSAGES)
    seen: list[int] = []
    assert ready.fuse({A: [B], B: [A]}, seen.append).encoded == 2 and seen == [1, 2]
    assert ready.fuse({A: [B, B], B: [A], C: [A]}).encoded == 1  # a neighbour named twice counts once
    ready.fuse({A: [C]}, variants=2)
    ready.fuse({A: [D]}, variants=2)
    assert variants(ready).of(A) == [(), (C,), (D,)]
    assert ready.library.key(A, (B,)) not in ready.library.store


def test_fewer_neighbours_than_wanted_and_none_at_all() -> None:
    ready = engine()
    ready.ensure([A, B])
    assert ready.fuse({A: [A], B: []}).encoded == 0  # itself is no context
    assert variants(ready).of(A) == [()]


def test_a_company_that_exceeds_the_window_loses_its_last() -> None:
    backbone = tiny_backbone()
    backbone.context_length = len(PREFIX) + len(A) + len(B) + len(C)
    ready = engine(backbone)
    ready.ensure([A, B, C, D])
    ready.fuse({A: [B, C, D]})
    assert variants(ready).of(A) == [(), (B, C)]


def test_strangers_are_left_out_and_reported() -> None:
    """Fusing must not bring back what was forgotten."""
    ready = engine()
    ready.ensure([A, B, C])
    ready.forget([C])
    result = ready.fuse({A: [C, B], C: [A]})
    assert variants(ready).of(A) == [(), (B,)] and variants(ready).of(C) == [()]
    assert [reason for _, reason in result.skipped] == ["the chunk is not known: ensure it first"]
    assert not ready.knows(C)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_chunks_are_fused_together_as_one_by_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = engine(tiny_backbone(kind)), engine(tiny_backbone(kind))
    contexts = {A: [B, C, D], B: [C], C: [], D: [B, A], f" {B} ": [C]}  # the last is B again
    for ready in (together, alone):
        ready.ensure([A, B, C, D])
    for text, context in contexts.items():
        alone.fuse({text: context})
    made: list[int] = []
    once = fusion_variants.fused
    monkeypatch.setattr(fusion_variants, "fused", lambda *args: made.append(len(args[2])) or once(*args))
    monkeypatch.setitem(TOGETHER, "cpu", 10_000)
    assert together.fuse(contexts).encoded == 3 and made == [3]
    for text, context in {A: (B, C, D), B: (C,), D: (B, A)}.items():
        one, other = (variants(ready).get(text, context) for ready in (together, alone))
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
    assert variants(ready).of(A) == [(), (B,)] and variants(ready).of(B) == [()]


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


# ---- keeping and forgetting ----------------------------------------------------------------------------------------


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
    assert variants(one).of(B) == [(), (A,)] and variants(two).of(B) == [()]
    assert one.library.key(B, (A,)) != two.library.key(B, (A,))


# ---- neighbours ----------------------------------------------------------------------------------------------------


def test_neighbours_are_the_most_similar_others_and_follow_the_corpus() -> None:
    vectors = {"a": [1.0, 0.0], "b": [2.0, 0.1], "c": [0.0, 1.0], "d": [0.7, 0.7]}  # length does not count
    known = Neighbourhood(2)
    known.add(list(vectors), list(vectors.values()))
    assert known.nearest(["a", "c"]) == {"a": ["b", "d"], "c": ["d", "b"]}
    known.add(["e"], [[0.05, 1.0]])
    assert known.nearest(["c", "unknown"]) == {"c": ["e", "d"]}
    known.remove(["d", "unknown"])
    assert known.nearest() == {"a": ["b", "e"], "b": ["a", "e"], "c": ["e", "b"], "e": ["c", "b"]}


def test_a_corpus_of_one_and_of_copies() -> None:
    assert similar(["a"], lambda texts: [[1.0]]) == {"a": []}
    calls: list[list[str]] = []

    def embed(texts: list[str]) -> np.ndarray:
        calls.append(texts)
        return np.eye(2)[: len(texts)]

    assert similar(["a", " a\n", "b"], embed) == {"a": ["b"], "b": ["a"]} and calls == [["a", "b"]]
    assert similar([], embed) == {}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0]], "need embeddings"),
        ([1.0, 2.0], "need embeddings"),
        ([[1.0, 2.0, 3.0]] * 2, "width 3 among"),
        ([[1.0, float("nan")]] * 2, "finite"),
        ([[1.0], [1.0, 2.0]], "rows of numbers"),
        ("ab", "rows of numbers"),
    ],
)
def test_what_is_no_embedding_is_refused_and_changes_nothing(vectors: Any, message: str) -> None:
    known = Neighbourhood()
    known.add(["a", "b"], [[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ConfigurationError, match=message):
        known.add(["c", "d"], vectors)
    assert len(known) == 2
    with pytest.raises(ConfigurationError, match="at least 1"):
        Neighbourhood(0)


def test_embeddings_stay_the_caller_s() -> None:
    vectors = np.array([[3.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    vectors.flags.writeable = False
    known = Neighbourhood(1)
    known.add(["a", "b"], vectors)
    again = np.array([[0.1, 5.0]], dtype=np.float32)
    before = again.copy()
    known.add(["c"], again)
    assert np.array_equal(again, before)
    again[:] = [9.0, 0.0]  # an embedding function may use its room again
    assert known.nearest(["c"]) == {"c": ["b"]}


def test_a_model_that_cannot_be_composed_is_not_fused_for() -> None:
    ready = Engine(tiny_backbone(), method=FUSED, on_uncomposable="prefill")
    ready.composable = False
    Fuser(1, lambda texts: 1 / 0)(ready)


def test_an_embedding_that_is_no_number_leaves_out_its_own_chunk_only(caplog: pytest.LogCaptureFixture) -> None:
    ready = engine()
    ready.ensure([A, B, C])
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [float("nan"), 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    with caplog.at_level("WARNING", "cacheclip_rag"):
        fuser(ready, show_progress=False)
    assert {text: fused_of(ready)(text) for text in (A, B, C)} == {A: [(), (B,)], B: [(), (A,)], C: [()]}
    assert "not made of finite numbers" in caplog.text and C[:20] in caplog.text
    numbers[C] = [0.9, 0.1]
    fuser(ready, show_progress=False)
    assert fused_of(ready)(C) == [(), (B,)]


def test_a_text_that_has_no_embedding_does_not_keep_the_others_from_being_fused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ready = engine()
    numbers = {B: [1.0, 0.1], C: [1.0, 0.2], D: [0.0, 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    ready.ensure([A, B, C])
    fuser(ready, show_progress=False)
    assert [ready.fused(text) for text in (A, B, C)] == [[], [(C,)], [(B,)]] and "no neighbours" in caplog.text
    ready.ensure([D])  # when the only other new one is it, too
    fuser(ready, show_progress=False)
    assert ready.fused(D) == [(C,)]


def test_an_embedding_function_that_is_away_is_not_asked_for_every_text() -> None:
    ready, asked = engine(), []

    def away(texts: list[str]) -> Any:
        asked.append(texts)
        raise ConnectionError

    ready.ensure(PASSAGES)
    Fuser(1, away)(ready, show_progress=False)
    assert list(map(len, asked)) == [5, 1, 1, 1]


def test_a_neighbour_that_was_forgotten_and_comes_back_is_fused_with_again() -> None:
    ready = engine()
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [0.0, 1.0], D: [0.1, 1.0]}
    fuser = Fuser(1, lambda texts: [numbers[text] for text in texts])
    ready.ensure([A, B, C, D])
    fuser(ready, show_progress=False)
    ready.forget([A])
    fuser.follow(ready)
    ready.ensure([A])
    fuser(ready, show_progress=False)
    assert [ready.fused(text) for text in (A, B, C, D)] == [[(B,)], [(A,)], [(D,)], [(C,)]]


def test_what_is_about_to_be_forgotten_is_nobody_s_neighbour() -> None:
    ready = engine()
    numbers = {A: [1.0, 0.0], B: [1.0, 0.1], C: [1.0, 0.5]}
    ready.ensure([A, B, C])
    Fuser(1, lambda texts: [numbers[text] for text in texts])(ready, show_progress=False, without=[A + "\n"])
    assert [ready.fused(text) for text in (A, B, C)] == [[], [(C,)], [(B,)]]


def test_embeddings_that_are_there_are_not_asked_for() -> None:
    ready, asked = engine(), []

    def embed(texts: list[str]) -> Any:
        asked.extend(texts)
        return [[0.0, 1.0] for _ in texts]

    ready.ensure([A, B, C])
    Fuser(1, embed)(ready, show_progress=False, vectors={A: [1.0, 0.0], B: [1.0, 0.1]})
    assert asked == [C] and ready.fused(A) == [(B,)] and ready.fused(C) == [(B,)]


def test_a_method_that_takes_no_fused_variants_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    ready = Engine(tiny_backbone(), method="query_guided")
    ready.ensure([A, B])
    fuser = Fuser(1, _counting)
    for _ in range(2):
        fuser(ready, show_progress=False)
    assert ready.fused(A) == [(B,)]  # for requests that name another
    assert [r.message for r in caplog.records if "takes no fused variants" in r.message] == [
        "query_guided, the engine's method, takes no fused variants; auto, fusionrag and query_guided:fused=True do"
    ]


@pytest.mark.parametrize("count", [0, -3, 2.5, "10", True, None])
def test_a_fuser_wants_a_whole_number(count: Any) -> None:
    with pytest.raises(ConfigurationError, match="fuse is how many"):
        Fuser(count, lambda texts: [])


def test_a_fuser_that_was_copied_or_pickled_goes_on() -> None:
    ready = engine()
    ready.ensure([A, B])
    for again in (copy.deepcopy(Fuser(1, _counting)), pickle.loads(pickle.dumps(Fuser(1, _counting)))):
        again(ready, show_progress=False)
        assert ready.fused(A) == [(B,)]


def _counting(texts: list[str]) -> list[list[float]]:
    return [[1.0, float(number)] for number, _ in enumerate(texts)]


def test_an_embedding_function_that_fails_says_so_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        similar(["a"], lambda texts: 1 / 0)


def test_many_texts_are_compared_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).normal(size=(50, 8))
    texts = [f"text {n}" for n in range(50)]
    at_once, in_batches = Neighbourhood(5), Neighbourhood(5)
    at_once.add(texts, vectors)
    in_batches.add(texts, vectors)
    want = at_once.nearest()
    monkeypatch.setattr("cacheclip_rag.corpus.neighbours._BATCH", 7)
    assert in_batches.nearest() == want
    scores = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)) @ vectors[3] / np.linalg.norm(vectors[3])
    assert want["text 3"] == [f"text {n}" for n in np.argsort(-scores) if n != 3][:5]


# ---- in an evaluation ----------------------------------------------------------------------------------------------


def item(name: str, *texts: str) -> Item:
    return Item(name, "Who?", ("x",), tuple(Passage("", text) for text in texts))


def test_company_from_use_is_what_other_items_retrieved_together() -> None:
    corpus = [item("1", A, B, C), item("2", B, A, D), item("3", B, A), item("4", C, E)]
    meet = meeting("use", 10, corpus, [], lambda texts: 1 / 0)
    found = meet(corpus[0]).neighbours
    assert found[A] == [B, D] and found[B] == [
        A,
        D,
    ]  # twice with each other, once with D; their own item is not counted
    assert found[C] == [E]
    assert meet(item("5", A, B)).neighbours[A][:1] == [B]
    alone = meeting("use", 2, [item("1", A, B, C, D)], [], lambda texts: 1 / 0)
    assert alone(item("1", A, B, C, D)).neighbours == {
        A: [C, D],
        B: [C, D],
        C: [D, A],
        D: [C, A],
    }  # as asked before, turned round


def test_company_from_prompts_are_the_items_most_like_this_one() -> None:
    corpus = [item("1", A, B, C), item("2", B, A, D), item("3", B, A, C), item("4", C, E), item("5", D, E)]
    met = meeting("prompts", 10, corpus, [], lambda texts: 1 / 0)
    assert met(corpus[0]).sequences == [[B, A, C], [B, A, D], [C, E]] and met(corpus[0]).neighbours == {}
    assert met(item("6", A, "new")).sequences[-1] == ["new", A]  # nobody else asked about "new"
    assert met(corpus[1]).sequences[0] in ([A, B, C], [B, A, C])


def test_company_by_resemblance_is_sought_in_the_whole_corpus() -> None:
    place = {A: 0.0, B: 0.1, C: 1.0, D: 0.9, E: 0.5}
    embed = lambda texts: [[np.cos(place[t]), np.sin(place[t])] for t in texts]  # noqa: E731
    meet = meeting("similar", 2, [item("1", A, C), item("2", B)], [D, E], embed)
    assert meet(item("1", A, C)).neighbours == {A: [B, E], C: [D, E]}
    with pytest.raises(ConfigurationError, match="similar, use, prompts"):
        meeting("rumour", 2, [], [], embed)


def test_systems_with_different_company_share_a_store_and_not_their_variants(tmp_path: Path) -> None:
    ready, items = Engine(tiny_backbone()), [item("1", A, B, C), item("2", C, A, E)]
    systems = parse(["naive:context=use", "naive:context=use,neighbours=1", "naive:context=prompts", "naive"])
    systems = [
        dataclasses.replace(s, meet=meeting(s.context, s.neighbours, items, [], lambda texts: 1 / 0))
        if s.context
        else s
        for s in systems
    ]
    assert run(ready, items[:1], systems, tmp_path / "rows.jsonl", dataset="set", max_new_tokens=2) == 0
    kl = {row["system"]: row["kl"] for row in map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())}
    assert len(set(kl.values())) == 5
    # Alone in a store, each gives the same.
    assert (
        run(Engine(tiny_backbone()), items[:1], systems[1:2], tmp_path / "one.jsonl", dataset="set", max_new_tokens=2)
        == 0
    )
    (_, row) = map(json.loads, (tmp_path / "one.jsonl").read_text().splitlines())
    assert row["kl"] == kl["naive:context=use,neighbours=1"]


def test_the_bytes_of_a_system_that_fuses_are_those_of_chunks_and_variants(tmp_path: Path) -> None:
    """With "use", one variant of each chunk; of C, A and E and of B, C and A fused as prompts, all but the first."""
    items = [item("1", A, B, C), item("2", C, A, E)]
    for context, variants_of in {"use": [A, B, C], "prompts": [A, C, A]}.items():
        ready, path = Engine(tiny_backbone()), tmp_path / f"{context}.jsonl"
        fusing = dataclasses.replace(
            parse([f"naive:context={context}"])[0], meet=meeting(context, 9, items, [], lambda texts: 1 / 0)
        )
        assert run(ready, items[:1], [*parse(["naive"]), fusing], path, dataset="set", max_new_tokens=2) == 0
        _, plain, row = map(json.loads, path.read_text().splitlines())
        size = {text: ready.library.get(ready.library.key(text)).nbytes for text in (A, B, C)}
        assert plain["stored_bytes"] == sum(size.values())
        assert row["stored_bytes"] == plain["stored_bytes"] + sum(size[text] for text in variants_of)
        assert row["stored_tokens"] == plain["stored_tokens"] == len(A) + len(B) + len(C)


@pytest.mark.parametrize("spec", ["naive:context=rumour", "naive:context=use,neighbours=0", "cachecraft:context=use"])
def test_systems_that_cannot_be_fused_are_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError):
        parse([spec])


def test_a_company_that_does_not_fit_is_no_row_of_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be reused by itself, or behind fewer, and the row would say otherwise."""
    ready = Engine(tiny_backbone(), method="naive")
    monkeypatch.setattr(ready.backbone, "window", 2 * len(A) + len(ready.library.prefix_ids))
    [system] = parse(["naive:context=use"])
    meet = meeting("use", 9, [item("1", A, B, C)], [], None)
    with pytest.raises(ConfigurationError, match="fewer neighbours"):
        access.fuse(ready, system.recipe, meet(item("1", A, B, C)))
    with pytest.raises(ConfigurationError, match="meet"):
        run(ready, [item("1", A, B)], [system], tmp_path / "x.jsonl", dataset="set", max_new_tokens=2)


# ---- from use ------------------------------------------------------------------------------------------------------


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
    # All occurred once: those before it are expected there with 2/3, those behind with 1/3.
    assert usage.expected_context("a", 5) == ["b", "c"] and usage.expected_context("b", 5) == ["a", "c"]
    usage.note(["a", "b"])
    assert usage.expected_context("a", 5) == ["c"] and usage.expected_context("b", 5) == [
        "a",
        "c",
    ]  # b came behind a both times
    usage.note(["b", "a"])
    assert usage.expected_context("a", 5) == ["b", "c"]  # 3 * 2/5 and 1 * 1/3


def test_usage_is_bounded_and_keeps_what_counts() -> None:
    usage = Usage(chunks=10, companions=4)
    for number in range(200):
        usage.note(["often", f"once {number}", "hub"])
    assert len(usage._seen) == 10 and max(map(len, usage._seen.values())) <= 2 * 4 + 1
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
    assert fused_of(ready)(C) == [(), (A, B)] and fused_of(ready)(A) == [(), (B,)]
    ready.close()
    again = engine(store=tmp_path)
    assert again.fuse_used(least=1).encoded == 1 and fused_of(again)(B) == [(), (A, C)]
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
    assert fused_of(allowed)(B) == [(), (A,)] and fused_of(not_allowed)(B) == [()]
    ready = engine(fuse_when_idle=True)
    ready.ensure([A, B])
    for _ in range(2):
        ready.generate(PREFIX + A + B + TAIL, max_new_tokens=1, method=NAIVE)  # which takes no fused KV
    ready.flush()
    assert fused_of(ready)(B) == [()]


def fused_of(engine: Engine) -> Any:
    return variants(engine).of


# ---- in order ------------------------------------------------------------------------------------------------------


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
    assert fused_of(ready)(C) == [(), (A, B)]  # it took the other's place
    assert ready.library.key(C, (A, B)) not in ready.library.store
    assert ready.fuse_in_order([[A, B, C], [A]]).encoded == 0


def test_a_sequence_whose_kv_is_gone_is_computed_again_and_kept() -> None:
    ready = engine()
    ready.ensure([A, B])
    assert ready.fuse_in_order([[A, B]]).encoded == 1
    key = ready.library.key(B, (A,), in_sequence=True)
    ready.library.store.delete([key])
    assert ready.fuse_in_order([[A, B]]).encoded == 1 and key in ready.library.store
    assert variants(ready).get(B, (A,)).context == (A,)


def test_sequences_share_what_they_have_in_common_and_know_no_strangers(tmp_path: Path) -> None:
    ready = engine(store=tmp_path)
    ready.ensure([A, B, C])
    result = ready.fuse_in_order([[A, B], [A, B, C], [D, A, B]])
    assert result.encoded == 2 and [reason for _, reason in result.skipped] == [
        "the chunk is not known: ensure it first"
    ]
    again = engine(store=tmp_path)
    assert fused_of(again)(C) == [(), (A, B)]
    (entry,) = [e for e in again.library.store.entries() if e.text == C and e.context]
    assert entry.in_sequence and again.library.get(entry.key).in_sequence
    again.forget([A])
    assert fused_of(again)(C) == [()]


# ---- Alternative Path ----------------------------------------------------------------------------------------------


def test_the_longest_path_drops_chunks_from_the_front() -> None:
    choose = LongestPath().choose
    assert choose([(), (B,), (A, B)], [A, B]) == (A, B)
    assert choose([(), (B,), (A, B)], [C, B]) == (B,)
    assert choose([(), (A,), (A, B)], [A, C]) == () and choose([(), (A,)], []) == ()


def test_the_paper_s_example() -> None:
    """S+b, then S+a+b: b is found behind S; then S+b+a: a is found where the second question left it."""

    class Three(paths.Workload):
        def __iter__(self) -> Any:
            return iter([["b"], ["a", "b"], ["b", "a"]])

    prefix, ours = paths.simulate(Three(base=1))
    assert (prefix.hit, prefix.stored, prefix.again) == (1, 1 + 4, 2)  # only S+b comes again
    assert (ours.hit, ours.stored, ours.again) == (3, 1 + 2, 0)


def test_one_copy_a_chunk_whatever_the_workload() -> None:
    workload = paths.Workload(queries=50, chunks_each=5, base=40, pool=20, seed=3)
    queries = list(workload)
    assert queries == list(workload) and all(len(set(q)) == 5 for q in queries) and len(queries) == 50
    prefix, ours = paths.simulate(workload)
    asked = [chunk for query in queries for chunk in query]
    assert ours.stored == len({*asked, *(f"base {n}" for n in range(40))}) < prefix.stored and ours.again == 0
    assert prefix.asked == ours.asked == 250 and ours.hit == 250 - (ours.stored - 40) > prefix.hit
    share = sum(chunk.startswith("base") for chunk in asked) / len(asked)
    assert 0.4 < share < 0.7
    with pytest.raises(ConfigurationError):
        paths.Workload(known=0.9, shared=0.2)


# ---- the ratio that a prompt needs ---------------------------------------------------------------------------------


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


def test_a_neighbourhood_says_what_changed_until_it_is_settled() -> None:
    known = Neighbourhood(2, tolerance=0.5)
    known.add(["a", "b", "c", "d"], [[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 1.0]])
    first = known.changed()
    assert set(first) == {"a", "b", "c", "d"} and known.changed() == first
    known.settled({text: first[text] for text in "abc"})
    assert set(known.changed()) == {"d"}  # as when it could not be fused
    known.settled(known.changed())
    assert known.changed() == {}
    known.add(["e"], [[1.0, 0.05]])  # one of a's, b's and c's two neighbours at most is another now
    assert set(known.changed()) == {"e"}
    known.settled(known.changed())
    known.add(["f"], [[1.0, 0.01]])  # now both of a's are
    assert {"a", "f"} <= set(known.changed())
    known.settled(known.changed())
    known.remove(["e"])
    assert "a" in known.changed()  # what it was fused with is no more
    with pytest.raises(ConfigurationError, match="tolerance"):
        Neighbourhood(tolerance=1.0)


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
    assert variants(ready).get(B, (A,)).context == (A,)


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
        assert set(variants(again).of(texts[0])) == {(), (texts[1],), (texts[2],), (texts[4],)}


# ---- at the command line -------------------------------------------------------------------------------------------


def save_model(folder: Path) -> None:
    backbone = tiny_backbone()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


def test_a_store_is_fused_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kv"
    save_model(folder)
    with Engine(str(folder), method="auto", store=kept) as first:
        first.ensure([A, B, C])
        prompt = first.backbone.shared_prefix() + A + B + TAIL
        for _ in range(2):
            first.generate(prompt, max_new_tokens=1)
    place = {A: 0.0, B: 0.2, C: 0.9}
    monkeypatch.setattr("cacheclip_eval.embedding.mean_pooling", lambda: lambda texts: [[1.0, place[t]] for t in texts])
    arguments = ["fuse", "--store", str(kept), "--model", str(folder), "--json"]
    for more, fused in ((["--least", "3"], 0), ([], 1), ([], 0), (["--similar", "--count", "1"], 2)):
        done = CliRunner().invoke(cli.app, [*arguments, *more])
        assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == fused, done.output
    done = CliRunner().invoke(cli.app, arguments[:-1])
    assert "0 of 1 chunks fused now, 0 left out" in done.stdout
    done = CliRunner().invoke(cli.app, [*arguments[:-1], "--least", "3"])
    assert done.exit_code == 0 and "no chunk came in 3 prompts yet" in done.stdout
    done = CliRunner().invoke(cli.app, [*arguments, "--method", "cachecraft"])
    assert done.exit_code == 2 and "encodes no chunk ahead" in done.stderr
    done = CliRunner().invoke(cli.app, ["fuse", "--store", str(tmp_path / "empty"), "--model", str(folder)])
    assert done.exit_code == 2 and "holds no chunks" in done.stderr
    with Engine(str(folder), method="auto", store=kept) as again:
        assert set(fused_of(again)(B)) == {(), (A,)} and set(fused_of(again)(A)) == {(), (B,)}


def test_a_keyed_store_of_another_dtype_is_fused_with_its_own_settings(tmp_path: Path) -> None:
    folder, kept, remote = tmp_path / "model", tmp_path / "kv", f"file://{tmp_path / 'remote'}"
    save_model(folder)
    (tmp_path / "secret").write_bytes(b"correct horse\n")

    def engine() -> Engine:
        return Engine(
            str(folder),
            method="auto",
            store=kept,
            secret=b"correct horse",
            remote=remote,
            tenant="one",
            kv_dtype="int8",
            dtype="float32",
        )

    with engine() as first:
        first.ensure([A, B])
        prompt = first.backbone.shared_prefix() + A + B + TAIL
        for _ in range(2):
            first.generate(prompt, max_new_tokens=1)
    arguments = [
        "fuse",
        "--store",
        str(kept),
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--tenant",
        "one",
        "--json",
    ]
    own = ["--secret-file", str(tmp_path / "secret"), "--kv-dtype", "int8", "--remote", remote]
    for missing in (own[:2], own[2:4]):  # another secret, or another dtype: nothing of what is there is its own
        less = [word for word in own if word not in missing]
        assert CliRunner().invoke(cli.app, [*arguments, *less]).exit_code == 2
    before = {path.name for path in (tmp_path / "remote").rglob("*.safetensors")}
    done = CliRunner().invoke(cli.app, [*arguments, *own])
    assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == 1, done.output
    assert len({path.name for path in (tmp_path / "remote").rglob("*.safetensors")} - before) == 1
    with engine() as again:
        assert set(fused_of(again)(B)) == {(), (A,)}
    for wrong, message in ((["--cap", "much"], "is no size"), (["--kv-dtype", "int4"], '"auto" or "int8"')):
        done = CliRunner().invoke(cli.app, [*arguments, *wrong])
        assert done.exit_code == 2 and message in done.stderr


def test_fusing_at_the_command_line_evicts_nothing_of_a_large_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inspect.signature(Engine.__init__).parameters["disk_bytes"].default == store_cli._DISK_BYTES
    monkeypatch.setattr(store_cli, "_DISK_BYTES", 1)  # whatever is there is more than that
    folder, kept = tmp_path / "model", tmp_path / "kv"
    save_model(folder)
    with Engine(str(folder), method="auto", store=kept) as first:
        first.ensure([A, B, C])
        for text in (A, C):
            for _ in range(2):
                first.generate(first.backbone.shared_prefix() + text + B + TAIL, max_new_tokens=1)
    before = {path.name for path in kept.rglob("*.safetensors")}
    done = CliRunner().invoke(cli.app, ["fuse", "--store", str(kept), "--model", str(folder), "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["fused"] == 1, done.output
    assert before < {path.name for path in kept.rglob("*.safetensors")}
