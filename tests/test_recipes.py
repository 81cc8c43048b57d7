"""What makes each published method itself, against oracles of our own: eager transformers, or sums written out here."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from exempt import NEEDS_A_FOLDER, NOT_AT_ALL_TOKENS, but
from oracles import assert_prefill_and_a_decoded_token, by_hand, distance, embed, finish, own, rows_of, together, watch
from tiny import PASSAGES, SHAPE, byte_tokenizer, tiny_backbone
from torch import Tensor
from transformers import AutoModelForCausalLM, GraniteConfig

from cacheclip_rag import METHODS, Engine
from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.errors import NotComposable
from cacheclip_rag.kv.encode.harvested import (
    Harvested,
    HarvestedVariant,
    HarvestedVariants,
    contextualisation,
    fix_overhead,
)
from cacheclip_rag.kv.prefix_caching import DocumentTree, PrefixBlocks
from cacheclip_rag.methods import Method, resolve
from cacheclip_rag.methods.attend.scaled import ScaledContext
from cacheclip_rag.methods.attend.selected_chunks import TopChunks
from cacheclip_rag.methods.recompute.once import Once
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.prefill.compose import shared_positions
from cacheclip_rag.prompt import Layout
from cacheclip_rag.store import MemoryBudget

NBYTES = 40
"""Of a harvested variant made up here."""
ALL = 1 - 1e-13  # everything that may be chosen, without the short cut that ratio 1 takes
KINDS = ["llama", "qwen3", "mistral-sliding", "gemma3"]


def engine_for(kind: str = "llama", method: str | Method = "naive", dtype: torch.dtype = torch.float32) -> Engine:
    return Engine(tiny_backbone(kind, dtype), auxiliary=tiny_backbone("qwen3"), method=method)


def prompt(passages: list[str], head: str = "Read:\n", question: str = "Who built it, and when was that?") -> str:
    return f"<|im_start|>{head}" + "\n\n".join(passages) + f"\n\n{question}<|im_end|>\n"


def known(method: str | Method, passages: list[str] = PASSAGES, kind: str = "llama") -> Engine:
    engine = engine_for(kind)
    engine.ensure(passages, method=method)
    return engine


def sorted_top(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices.sort().values


# ---- every method, awkward prompts -----------------------------------------------------------------------------------

AWKWARD = {
    "a chunk twice": prompt([PASSAGES[0], PASSAGES[1], PASSAGES[0]]),
    "the question first": prompt(PASSAGES[:3], head="Who built it? Read:\n", question=""),
    "partial": prompt([PASSAGES[0][70:], PASSAGES[1][:-80], PASSAGES[2]]),
    "one chunk": prompt(PASSAGES[:1]),
    "one chunk and nothing else": PASSAGES[0],
    "no chunk": prompt(["Nothing known."]),
    "chunks at both ends": "\n\n".join(PASSAGES[:3]),
}


CASES = [("llama", name) for name in AWKWARD]
CASES += [(kind, name) for kind in ("mistral-sliding", "gemma3", "bfloat16") for name in list(AWKWARD)[:2]]


@pytest.mark.parametrize(("kind", "awkward"), CASES)
def test_awkward_prompts_are_reused_and_recomputing_everything_is_full_prefill(kind, awkward):
    text, tolerance = AWKWARD[awkward], 6e-2 if kind == "bfloat16" else 2e-4
    engine = engine_for("llama", dtype=torch.bfloat16) if kind == "bfloat16" else engine_for(kind)
    full = engine.prefill(text, method="full").logits
    for name in but(NEEDS_A_FOLDER):
        method = METHODS[name]
        engine.ensure(PASSAGES[:3], method=name)
        alike = awkward == "no chunk" or name == "cachecraft" or not method.ahead
        for ratio in (None, 0.0, ALL):  # the later ones find what the first left
            result = engine.prefill(text, method=name, recompute_ratio=ratio)
            report = result.report
            assert report.fallbacks == [], (name, ratio)
            assert report.prompt_tokens == report.prefix + report.reused + report.recomputed + report.fresh
            if alike or (name not in NOT_AT_ALL_TOKENS and ratio == ALL):
                assert distance(result.logits, full) < tolerance, (name, ratio)
        assert result.step(torch.tensor([65]), len(result.layout)).isfinite().all()


def test_a_model_that_scales_its_embeddings_is_not_run_in_stages():
    """Granite multiplies what enters it, token or residual stream: stages would do it twice."""
    torch.manual_seed(0)
    granite = AutoModelForCausalLM.from_config(GraniteConfig(**SHAPE, embedding_multiplier=12.0)).eval()
    backbone = Backbone(granite, byte_tokenizer())
    with pytest.raises(NotComposable):
        backbone.advance(torch.arange(5), torch.arange(5), backbone.canvas(5), 0, 2)
    with Engine(backbone, method="droidspeak") as engine:
        assert engine.ensure(PASSAGES[:1]).skipped


# ---- encoders and static choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_link0_chunks_are_transformers_own_behind_dummies(kind):
    method = resolve("link0", count=3, token="_")
    engine = known(method, PASSAGES[:1], kind)
    library = engine.library_of(method)
    chunk = library.get(library.key(PASSAGES[0]))
    ids = engine.backbone.tokenise("___" + PASSAGES[0]).ids
    assert chunk.position == 3 and torch.equal(chunk.ids, ids[3:])
    theirs = own(kind, ids)
    assert distance(chunk.keys, theirs.keys[:, :, 3:]) < 1e-5 and distance(chunk.values, theirs.values[:, :, 3:]) < 1e-5


def test_legolink_takes_the_first_k_of_each_chunk_and_epic_the_same_share():
    engine = known("legolink")
    text = prompt(PASSAGES)
    _, request, seen = watch(engine, resolve("legolink", tokens=7), text)
    starts = [int((request.layout.offsets[:, 0] == text.index(p)).nonzero()[0]) for p in PASSAGES]
    assert seen["chosen"].tolist() == [start + i for start in starts for i in range(7)]
    _, request, seen = watch(engine, "epic", text, recompute_ratio=0.1)
    for start, passage in zip(starts, PASSAGES, strict=True):
        mine = [row - start for row in seen["chosen"].tolist() if start <= row < start + len(passage)]
        assert mine == list(range(len(mine))) and abs(len(mine) - 0.1 * len(passage)) < 1
    _, request, seen = watch(engine, resolve("legolink", tokens=7), "\n\n".join(PASSAGES[:2]) + " Who?")
    assert seen["chosen"].tolist() == [len(PASSAGES[0]) + 2 + i for i in range(7)], "the first chunk is in place here"


def test_random_is_drawn_anew_for_another_prompt_or_seed_only():
    engine = known("random")
    chosen = lambda text, seed=0: watch(engine, resolve("random", seed=seed), text)[2]["chosen"].tolist()  # noqa: E731
    first = chosen(prompt(PASSAGES))
    assert first == chosen(prompt(PASSAGES)) == sorted(set(first))
    assert first != chosen(prompt(PASSAGES), seed=1) and first != chosen(prompt(PASSAGES, question="Who? And why?"))


# ---- CacheBlend ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["keys", "keys squared", "values squared"])
@pytest.mark.parametrize("kind", KINDS)
def test_cacheblend_recomputes_what_a_full_prefill_would_change_most(kind, of):
    engine = known("cacheblend", kind=kind)
    _, request, seen = watch(engine, resolve("cacheblend", of=of), prompt(PASSAGES))
    ids, full = request.layout.ids, own(kind, request.layout.ids)
    scores = torch.full((len(ids),), -math.inf)
    for rows in rows_of(request):
        alone = own(kind, ids[rows], positions=rows)
        fresh, stored = (full.values, alone.values) if of == "values squared" else (full.keys, alone.keys)
        squares = (fresh[1][:, rows] - stored[1]).pow(2).sum(dim=-1)  # [Hk, n]
        scores[rows] = squares.sqrt().mean(dim=0) if of == "keys" else squares.sum(dim=0)
    assert torch.equal(seen["chosen"], sorted_top(scores, int(0.15 * sum(map(len, PASSAGES)))))


# ---- DroidSpeak ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_droidspeak_keeps_the_residual_stream_that_enters_the_transition_layer(kind):
    for layer, entered in ((1, 1), (2, 2), (4, 2)):  # of four layers, the last but one is the deepest
        method = resolve("droidspeak", transition_layer=layer)
        engine = known(method, PASSAGES[:1], kind)
        chunk = engine.library_of(method).ensure(PASSAGES[0])
        assert distance(chunk.extra["activations"], own(kind, chunk.ids).hidden_states[entered][0]) < 1e-5


@pytest.mark.parametrize("transition", [1, 2, 4])
def test_droidspeak_reselects_by_what_one_dense_layer_makes_of_stored_activations(transition):
    layer = min(transition, 2)
    method = replace(resolve("droidspeak", transition_layer=transition), select=METHODS["random"].select)
    result, request, seen = watch(known(method), method, prompt(PASSAGES))
    ids, everything = request.layout.ids, together(request.rows, request.fresh)
    kv = tuple(t.clone() for t in seen["stored"])
    rows = together(request.fresh, seen["chosen"])
    stream = torch.zeros(len(ids), 64)
    for mine in rows_of(request):
        stream[mine] = own("llama", ids[mine]).hidden_states[layer][0]
    stream[rows] = by_hand(embed(ids[rows]), rows, rows, kv, range(layer))
    stream[everything] = by_hand(stream[everything], everything, everything, kv, range(layer, layer + 1))
    dense = tuple(t.clone() for t in kv)
    by_hand(stream[everything], everything, everything, dense, range(layer + 1, layer + 2))
    moved = (dense[0][layer + 1] - seen["stored"][0][layer + 1]).norm(dim=-1).mean(dim=0)[request.rows]
    again = request.rows[sorted_top(moved, len(seen["chosen"]))]
    rows = together(request.fresh, again)
    expected = finish(by_hand(stream[rows], rows, rows, kv, range(layer + 1, 4)))
    assert distance(result.logits, expected) < 1e-4
    assert result.report.recomputed == len(set(again.tolist()) | set(seen["chosen"].tolist())) > len(again)


# ---- APE, PSR, SEL ---------------------------------------------------------------------------------------------------


def two_merged(logits: Tensor, context: Tensor, temperature: float, mass: float) -> Tensor:
    """APE's two attentions as published, ``softmax([s LSE_C, LSE_O])`` between them: probabilities of ``logits``."""
    inside, outside = (logits / temperature).masked_fill(~context, -math.inf), logits.masked_fill(context, -math.inf)
    both = torch.stack([mass * inside.logsumexp(dim=-1), outside.logsumexp(dim=-1)])
    of_context, of_others = both.softmax(dim=0).unsqueeze(-1)
    return of_context * inside.softmax(dim=-1).nan_to_num(0.0) + of_others * outside.softmax(dim=-1)


@pytest.mark.parametrize(("temperature", "mass"), [(0.9, 0.81), (0.3, 0.5), (1.0, 1.0), (2.0, 1.5)])
def test_one_softmax_is_the_published_merge_of_two(temperature, mass):
    rows, context = torch.arange(12, 20), torch.arange(20).ge(5) & torch.arange(20).lt(12)
    logits = 4 * torch.randn(2, 2, 8, 20, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    logits = logits.masked_fill(torch.arange(20) > rows[:, None], -math.inf)
    logits[:, :, 0, 5:12] = -math.inf  # this row sees nothing of the context
    ours = ScaledContext(context[:14], temperature, mass).probabilities(logits, rows, None)
    assert torch.allclose(ours, two_merged(logits, context, temperature, mass), atol=1e-12)


def test_shared_positions_on_a_layout_made_by_hand():
    # preamble, chunk 0 of three tokens, a separator, chunk 1 of five with a token of its own inside, the question
    chunk = torch.tensor([-1, -1, 0, 0, 0, -1, 1, 1, -1, 1, 1, -1, -1])
    token = torch.tensor([-1, -1, 0, 1, 2, -1, 0, 1, -1, 3, 4, -1, -1])
    layout = Layout("", torch.arange(13), torch.zeros(13, 2), (), chunk, token, torch.zeros(13, dtype=torch.bool))
    assert shared_positions(layout).tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("rows", ["all", "question"])
@pytest.mark.parametrize("name", ["ape", "psr"])
def test_scaled_attention_through_the_model_and_into_decoding(name, rows):
    """APE scales what was stored, PSR what of it was not recomputed, from layer 1 on; decoded tokens see it too."""
    method = resolve(name, temperature=0.7, scale=0.8, rows=rows)
    result, request, seen = watch(known(method), method, prompt(PASSAGES))
    chosen = seen["chosen"]
    context = torch.cat([request.layout.chunk >= 0, torch.tensor([False])])
    last = int(context.nonzero()[-1])
    context[chosen] = False

    def weigh(layer: int, logits: Tensor, slots: Tensor) -> Tensor:
        scaled = two_merged(logits, context, 0.7, 0.7 * 0.8)
        plain = slots <= last if rows == "question" else slots < 0
        plain = torch.ones_like(plain) if name == "psr" and layer == 0 else plain
        return torch.where(plain[:, None], logits.softmax(dim=-1), scaled)

    positions = torch.arange(len(request.layout) + 1)
    if name == "ape":
        starts = [int(rows[0]) for rows in rows_of(request)] + [last + 1]
        for start, stop in pairwise(starts):
            positions[start:stop] -= start - starts[0]
        longest = max(stop - start for start, stop in pairwise(starts))
        positions[last + 1 :] -= last + 1 - (starts[0] + longest)
    assert_prefill_and_a_decoded_token(result, seen, positions, weigh)
    assert (len(chosen) > 0) == (name == "psr")


def test_ape_decodes_behind_the_longest_chunk_even_when_the_prompt_ends_in_a_shorter_one():
    engine = known("ape")
    result, request, _ = watch(engine, "ape", "\n\n".join([PASSAGES[1], PASSAGES[0]]))
    result.step(torch.tensor([65]), row := len(request.layout))
    there, moved = (
        result.canvas.keys[0, 0, :, row],
        own("llama", torch.tensor([65]), torch.tensor([len(PASSAGES[1]) + 2])),
    )
    assert len(PASSAGES[1]) > len(PASSAGES[0]) and distance(there, moved.keys[0, :, 0]) < 1e-4


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_sel_shows_the_question_the_chunks_it_likes_best(keep):
    method = resolve("sel", keep=keep)
    result, request, seen = watch(known(method), method, prompt(PASSAGES))
    chunks = rows_of(request)
    last = int(chunks[-1][-1])

    def weigh(layer: int, logits: Tensor, slots: Tensor) -> Tensor:
        p, asking = logits.softmax(dim=-1), slots > last
        liked = [p[:, asking][:, :, rows].topk(5).values.sum() for rows in chunks]
        for number in torch.stack(liked).argsort()[: 5 - keep].tolist():
            logits[:, asking.nonzero(), chunks[number]] = -math.inf
        return logits.softmax(dim=-1)

    # A decoded token is a row behind the last chunk of its own forward, so it chooses for itself.
    assert_prefill_and_a_decoded_token(result, seen, torch.arange(len(request.layout) + 1), weigh)


def test_sel_by_hand_and_hidden_chunks_weigh_nothing():
    shape = TopChunks(torch.tensor([-1, 0, 0, 1, 1, 2, 2, -1]), keep=1, best=1, start=7, stop=8)
    logits = torch.tensor([0.0, 2.0, 0.0, 1.5, 1.5, 0.0, 0.0, 0.0]).expand(1, 1, 1, 8)
    rows = torch.tensor([7])
    weights = shape.probabilities(logits, rows, shape.prepare(iter([(logits, rows)])))[0, 0, 0]
    assert weights[3:7].tolist() == [0.0] * 4 and weights[[0, 1, 2, 7]].min() > 0 and abs(weights.sum() - 1) < 1e-6
    shape.best = 2  # chunk 1's two together outweigh chunk 0's peak
    weights = shape.probabilities(logits, rows, shape.prepare(iter([(logits, rows)])))[0, 0, 0]
    assert weights[[1, 2, 5, 6]].tolist() == [0.0] * 4


# ---- Cache-Craft -----------------------------------------------------------------------------------------------------


def test_contextualisation_and_overhead_on_cases_by_hand():
    assert contextualisation(0.0, 1.0) == 0.5
    assert contextualisation(2.0, 1.0) == pytest.approx(1 / (1 + math.exp(-2)))
    inter = {"a": 3.0, "b": 1.0, "c": 4.0}
    cases = [
        ((), (), {}, 0.0),  # nothing was before it
        ("abc", "abc", inter, 0.0),
        ("abc", "xaybzc", inter, 0.0),  # strangers in between do not count
        ("abc", "ab", inter, 0.8 * (1 - 4 / 8)),  # beta
        ("abc", "aab", inter, 0.8 * (1 - 4 / 8)),  # a chunk twice counts once
        ("abc", "acb", inter, 0.8 * (1 - 2 / 3)),  # gamma: one pair of three
        ("abc", "cb", inter, 0.8),  # all pairs the other way round
        ("abc", "", inter, 0.8),
    ]
    for old, new, paid, expected in cases:
        assert fix_overhead(0.8, paid, old, new) == pytest.approx(expected), (old, new)
    assert fix_overhead(0.8, inter, "abc", "", alpha=3.0) == 1.0


def variant(before: str, **inter: float) -> HarvestedVariant:
    empty, keys = torch.empty(0), torch.zeros(NBYTES, dtype=torch.uint8)
    return HarvestedVariant(ChunkKV("", empty, empty, keys, empty, 0), tuple(before), inter, cci=0.8)


def test_the_variant_with_the_lowest_overhead_is_taken_and_caps_hold():
    variants = HarvestedVariants(Harvested(variants=3), MemoryBudget(4 * NBYTES))
    first, second, third = variant("ab", a=1.0, b=1.0), variant("ac", a=3.0, c=1.0), variant("")
    for v in (first, second, second):
        variants.add("x", v)
    assert variants.best("x", "ac") == (second, 0.0)
    assert variants.best("x", "a")[0] is second and variants.best("x", "b")[0] is first
    variants.add("x", third)
    assert variants.best("x", "c")[0] is third, "it paid attention to no other chunk"
    assert variants.best("x", "ac")[0] is second, "just as low, and it was computed behind this chunk"
    variants.add("x", variant("d", d=1.0))  # a fourth: the least used goes
    assert len(variants.of("x")) == 3 and first not in variants.of("x")
    variants.add("y", variant(""))
    variants.best("x", "a")
    variants.add("z", variant("x", x=1.0))
    assert [name in variants for name in "xyz"] == [True, False, True], "the least recently used chunk went"
    variants.forget("x")
    assert not any(name in variants for name in "xyz"), "what stood behind a forgotten chunk carries it"


@pytest.mark.parametrize("kind", KINDS)
def test_harvested_masses_are_transformers_attentions(kind):
    engine = known("cachecraft", kind=kind)
    layout = engine.prefill(text := prompt(PASSAGES[:3]), method="cachecraft").layout
    layers = engine.backbone.full_layers
    theirs = own(kind, layout.ids)
    attention = torch.stack([theirs.attentions[i][0] for i in layers]).mean(dim=(0, 1))  # [T, T]
    starts = [int((layout.offsets[:, 0] == text.index(p)).nonzero()[0]) for p in PASSAGES[:3]]
    parts = [slice(s, s + len(p)) for s, p in zip(starts, PASSAGES, strict=False)]
    names = [engine.library.key(p) for p in PASSAGES[:3]]
    for i in range(3):
        (v,) = engine.variants_of("cachecraft", PASSAGES[i])
        paid = [attention[parts[i], parts[j]] for j in range(i)]
        size = [len(p) for p in PASSAGES]
        assert v.before == tuple(names[:i]) and v.inter == pytest.approx(
            {names[j]: float(p.sum()) for j, p in enumerate(paid)}, rel=1e-3
        )
        inter_attention = sum((p.sum(dim=1) for p in paid), torch.zeros(size[i]))
        assert torch.allclose(v.kv.extra["inter_attention"], inter_attention, atol=1e-5)
        a = sum(float(p.sum()) / (size[i] * size[j]) for j, p in enumerate(paid))
        b = float(attention[parts[i], parts[i]].sum()) / size[i] ** 2
        assert v.cci == pytest.approx(1 / (1 + math.exp(-a / b)), rel=1e-4)
        assert distance(v.kv.keys, theirs.keys[:, :, parts[i]]) < 1e-4


def test_cachecraft_recomputes_the_tokens_that_leaned_most():
    engine = known("cachecraft")
    engine.prefill(prompt(PASSAGES), method="cachecraft")
    _, request, seen = watch(engine, "cachecraft", prompt([PASSAGES[i] for i in (2, 0, 1)]))
    expected = []
    for number, i in enumerate((2, 0, 1)):
        (v,) = engine.variants_of("cachecraft", PASSAGES[i])
        before = [engine.library.key(PASSAGES[j]) for j in (2, 0, 1)[:number]]
        count = math.ceil(fix_overhead(v.cci, v.inter, v.before, before) * len(PASSAGES[i]))
        rows = (request.layout.chunk == number).nonzero()[:, 0]
        expected += rows[sorted_top(v.kv.extra["inter_attention"], count)].tolist()
    assert seen["chosen"].tolist() == expected and len(expected) > len(PASSAGES[2]) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_order_again_recomputes_nothing_and_is_exact(dtype):
    engine = engine_for(dtype=dtype)
    orders = [PASSAGES[:1], [PASSAGES[1], PASSAGES[0]], [PASSAGES[2], PASSAGES[1], PASSAGES[2]]]
    for order in orders:  # each brings a new chunk, so each is harvested
        engine.ensure(order, method="cachecraft")
        assert engine.prefill(prompt(order), method="cachecraft").report.reused == 0
    for order in orders:
        again = engine.prefill(prompt(order), method="cachecraft")
        assert again.report.recomputed == 0 and again.report.reused == sum(map(len, order))
        full = engine.prefill(prompt(order), method="full")
        assert distance(
            again.canvas.keys[:, 0, :, : len(again.layout)], full.canvas.keys[:, 0, :, : len(again.layout)]
        ) < (1e-5 if dtype == torch.float32 else 1e-2)


# ---- early stop ------------------------------------------------------------------------------------------------------


def test_early_stop_with_the_whole_share_is_once():
    method = replace(METHODS["cacheblend"], recompute=METHODS["cachecraft"].recompute)
    engine = known(method)
    stop = engine.prefill(prompt(PASSAGES), method=resolve(method, share=1.0))
    once = engine.prefill(prompt(PASSAGES), method=replace(method, recompute=Once()))
    assert torch.equal(stop.canvas.keys[..., : len(stop.layout), :], once.canvas.keys[..., : len(stop.layout), :])


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_early_stop_leaves_chunks_out_of_focus_as_stored_further_up(share):
    method = replace(METHODS["epic"], recompute=METHODS["cachecraft"].recompute)
    result, request, seen = watch(known(method), resolve(method, share=share), prompt(PASSAGES))
    ids, chosen, kv = request.layout.ids, seen["chosen"], tuple(t.clone() for t in seen["stored"])
    mass, asked = torch.zeros(5), request.question_rows

    def weigh(layer: int, logits: Tensor, slots: Tensor) -> Tensor:
        p = logits.softmax(dim=-1)
        mass.index_add_(0, request.groups, p[:, torch.isin(slots, asked)][:, :, request.rows].sum(dim=(0, 1)))
        return p

    rows = together(request.fresh, chosen)
    stream = by_hand(embed(ids[rows]), rows, rows, kv, range(2), weigh)  # 0.4 of four layers are two
    focus, held = [], 0.0
    for number in mass.argsort(descending=True).tolist():
        if held < share:
            focus.append(number)
            held += float(mass[number] / mass.sum())
    assert 0 < len(focus) < 5
    stopped = chosen[~torch.isin(request.layout.chunk[chosen], torch.tensor(focus))]
    on = ~torch.isin(rows, stopped)
    assert distance(result.logits, finish(by_hand(stream[on], rows[on], rows[on], kv, range(2, 4)))) < 1e-4
    now, stored = result.canvas.values[:, 0], seen["stored"][1]
    assert torch.equal(now[2:, :, stopped], stored[2:, :, stopped])
    assert distance(now[1, :, stopped], stored[1, :, stopped]) > 1e-2
    assert result.report.recomputed == len(chosen)


# ---- exact reuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["prefix-cache", "ragcache"])
def test_exact_reuse_takes_an_identical_beginning_and_no_more(kind, name):
    engine = known(name, kind=kind)
    head = len("Read:\n") + 1  # the control token is one
    first, length = prompt(PASSAGES[:3]), [len(p) for p in PASSAGES]
    two = head + length[0] + 2 + length[1] + 2
    cases = [
        (first, 0),
        (first, two + length[2]),
        (prompt([PASSAGES[0], PASSAGES[1], PASSAGES[3]]), two),
        (prompt([PASSAGES[0], PASSAGES[2]]), head + length[0] + 2),
        (prompt([PASSAGES[1], PASSAGES[0]]), head),
        (prompt(PASSAGES[:3], head="Rxad:\n"), 2),
    ]
    for text, shared in cases:
        result = engine.prefill(text, method=name)
        if name == "ragcache":  # whole documents
            assert result.report.prefix == (shared if shared > 2 else 0)
        else:  # whole blocks of what is the same, which goes on into the text behind
            ids = [engine.backbone.tokenise(t).ids.tolist() for t in (text, first)]
            same = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), len(ids[0]) - 1)
            assert result.report.prefix == (0 if shared == 0 else same // 16 * 16)
        full, new, row = engine.prefill(text, method="full"), torch.tensor([65]), len(result.layout)
        assert distance(result.logits, full.logits) < 1e-4
        assert distance(result.step(new, row), full.step(new, row)) < 1e-4
    engine.forget(PASSAGES[:1])
    engine.ensure(PASSAGES[:1], method=name)
    assert engine.prefill(first, method=name).report.prefix == 0, "forgotten"


def filled(backbone: Backbone, count: int) -> Any:
    canvas = backbone.canvas(count)
    canvas.keys.zero_(), canvas.values.zero_()
    return canvas


def test_blocks_go_deepest_first_under_a_cap_in_bytes():
    backbone = tiny_backbone()
    block = 2 * 4 * 2 * 16 * 16 * 4  # keys and values of 4 layers, 2 heads, 16 tokens, 16 dimensions, 4 bytes
    a, b = torch.arange(64), torch.cat([torch.arange(16), torch.arange(100, 148)])
    cache = PrefixBlocks().open(MemoryBudget(5 * block))
    cache.keep(a, [], filled(backbone, 64), 0.0)
    assert cache.nbytes == 4 * block
    cache.keep(b, [], filled(backbone, 64), 0.0)  # shares one block, brings three: two of a's must go
    assert cache.nbytes == 5 * block
    more = torch.tensor([7])
    assert [len(cache.longest(torch.cat([t, more]), [])) for t in (a, b)] == [2, 4]
    assert len(cache.longest(b, [])) == 3, "the prompt's last token is computed"


def test_a_block_is_known_behind_its_own_beginning_only():
    cache, backbone = PrefixBlocks().open(MemoryBudget(1 << 30)), tiny_backbone()
    for ids in (torch.arange(33), torch.arange(100, 133)):
        cache.keep(ids, [], filled(backbone, 33), 0.0)
    mixed = torch.cat([torch.arange(16), torch.arange(116, 133)])
    assert len(cache.longest(mixed, [])) == 1 and cache.longest(torch.arange(1, 34), []) == []


class Tree:
    """A `DocumentTree` of so many documents of ten tokens each, asked for paths of letters."""

    BYTES = 10 * 2 * 4 * 2 * 16 * 4  # keys and values of 4 layers, 2 heads, 16 dimensions, 4 bytes

    def __init__(self, documents: int) -> None:
        self.backbone, self.most = tiny_backbone(), documents * self.BYTES
        self.cache = DocumentTree().open(MemoryBudget(self.most))

    def found(self, path: str) -> int:
        return len(self.cache.longest(*self._prompt(path)))

    def ask(self, path: str, seconds: float) -> int:
        """How many of the documents were there; then all are kept, each at so many seconds a token."""
        found = self.found(path)
        ids, borders = self._prompt(path)
        self.cache.keep(ids, borders, filled(self.backbone, len(ids)), seconds)
        assert self.cache.nbytes <= self.most
        return found

    def _prompt(self, path: str) -> tuple[torch.Tensor, list[int]]:
        ids = torch.cat([*(torch.full((10,), ord(name)) for name in path), torch.tensor([9])])
        return ids, list(range(0, 10 * len(path) + 1, 10))


def test_the_tree_evicts_the_leaf_with_the_lowest_priority():
    tree = Tree(5)
    assert tree.ask("ab", 1.0) == 0 and tree.ask("c", 5.0) == 0 and tree.ask("d", 2.0) == 0
    assert tree.cache.nbytes == 4 * tree.BYTES
    assert tree.ask("ab", 1.0) == 2 and tree.ask("ab", 1.0) == 2  # a and b: three times a second
    assert tree.ask("ba", 4.0) == 0, "order matters; six nodes, so d, used once for two seconds, goes"
    assert tree.cache.nbytes == tree.most and tree.found("d") == 0
    assert [tree.ask(path, 4.0) for path in ("ab", "c")] == [2, 1]
    tree.ask("e", 0.5)  # below all others': it goes itself
    assert [tree.found(path) for path in ("e", "ab", "ba", "c")] == [0, 2, 2, 1]

    tree = Tree(2)
    tree.ask("a", 0.1), tree.ask("ab", 9.0), tree.ask("c", 1.0)  # a costs least, but b stands behind it
    assert tree.found("ab") == 2 and tree.found("c") == 0


@pytest.mark.parametrize(("newcomers", "kept"), [("bcd", True), ("bcdefghijk", False)])
def test_old_fame_fades_from_the_tree(newcomers, kept):
    """The clock moves on to the priority of what is evicted, and what is new begins there."""
    tree = Tree(2)
    for _ in range(3):
        tree.ask("a", 1.0)
    for name in newcomers:
        tree.ask(name, 1.0)
    assert tree.found("a") == kept
