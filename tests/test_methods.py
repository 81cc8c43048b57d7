"""Every recipe of the table through the engine: what all of them promise, and what makes each of them itself."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import pytest
import torch
from exempt import NEEDS_A_FOLDER, NOT_AT_ALL_TOKENS, OTHER_BUDGET, but
from tiny import CONFIGS, PASSAGES, tiny_backbone

from cacheclip_rag import METHODS, Engine
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.encode import Blanks
from cacheclip_rag.methods import resolve

names = pytest.mark.parametrize("name", but(NEEDS_A_FOLDER))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_backbone("qwen2"), auxiliary=tiny_backbone("llama"), method="cacheclip")


def prompt(engine: Engine, order: tuple[int, ...] = (1, 2, 3, 4, 0)) -> str:
    passages = "\n\n".join(PASSAGES[i] for i in order)
    content = f"Passages:\n{passages}\n\nQuestion: Who built the lighthouse?"
    return engine.backbone.chat([{"role": "user", "content": content}])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- the table -----------------------------------------------------------------------------------------------------


@names
def test_ratio_one_is_full_prefill(engine, name):
    engine.ensure(PASSAGES, method=name)
    whole = engine.prefill(prompt(engine), method=name, recompute_ratio=1.0)
    assert distance(whole.logits, engine.prefill(prompt(engine), method="full").logits) < 1e-4


@pytest.mark.parametrize("name", but(NOT_AT_ALL_TOKENS))
def test_recomputing_everything_token_by_token_is_full_prefill(engine, name):
    """A ratio of exactly 1 is answered by full prefill; this one goes the method's own way and leaves nothing out."""
    engine.ensure(PASSAGES, method=name)
    whole = engine.prefill(prompt(engine), method=name, recompute_ratio=1 - 1e-13)
    report = whole.report
    assert report.recomputed > 1000 and report.reused == 0
    assert distance(whole.logits, engine.prefill(prompt(engine), method="full").logits) < 1e-4


@names
def test_every_token_is_counted_once_and_nothing_falls_back(engine, name):
    engine.ensure(PASSAGES, method=name)
    report = engine.prefill(prompt(engine), method=name).report
    assert report.fallbacks == []
    assert report.prompt_tokens == report.prefix + report.reused + report.recomputed + report.fresh


@names
def test_the_answer_goes_on_from_the_prompt_as_the_method_left_it(engine, name):
    """Decoding one token at a time gives the logits of all of them at once: positions and shapes are kept up."""
    engine.ensure(PASSAGES, method=name)
    tokens = torch.tensor([72, 101, 108, 108])
    once, apart = (engine.prefill(prompt(engine), method=name) for _ in range(2))
    together = once.step(tokens, len(once.layout))
    steps = [apart.step(tokens[i : i + 1], len(apart.layout) + i) for i in range(4)]
    assert distance(torch.cat(steps), together) < 1e-4


@pytest.mark.parametrize("name", but(OTHER_BUDGET))
def test_the_budget_is_met_exactly(engine, name):
    engine.ensure(PASSAGES, method=name)
    report = engine.prefill(prompt(engine), method=name, recompute_ratio=0.1).report
    assert report.recomputed == int(0.1 * (report.recomputed + report.reused))


def test_unknown_names_and_parameters_name_the_valid_ones():
    with pytest.raises(ConfigurationError, match=r"cacheblend.*psr"):
        resolve("cachblend")
    with pytest.raises(ConfigurationError, match=r"check_layer.*temperature"):
        resolve("psr", wndow=3)
    with pytest.raises(ConfigurationError, match="temperature must be above 0"):
        resolve("ape", temperature=0.0)
    with pytest.raises(ConfigurationError, match="positions must be"):
        resolve("ape", positions="local")


def test_a_method_with_parameters_is_one_string():
    assert resolve("cacheclip:group_size=16,layers=upper") == resolve("cacheclip", group_size=16, layers="upper")
    assert resolve("infoflow:layers=(0.5, 0.7),reorder=True").select.layers == (0.5, 0.7)
    assert resolve("epic:prefix=system").encode.prefix is None
    for wrong in (
        "cacheclip:group_size",
        "cacheclip:group_size=wide",
        "cacheclip:layers=first",
        "epic:prefix=no",
        "sel:keep=(1",
    ):
        with pytest.raises(ConfigurationError):
            resolve(wrong)


def test_a_parameter_that_parts_share_changes_in_all_of_them():
    method = resolve("droidspeak", transition_layer=2)
    assert (method.encode.transition_layer, method.recompute.transition_layer) == (2, 2)


# ---- encodings side by side ------------------------------------------------------------------------------------------


def test_a_method_that_encodes_differently_finds_no_chunk_until_it_is_encoded_that_way():
    with Engine(tiny_backbone("llama"), method="naive") as engine:
        engine.ensure(PASSAGES)
        first = engine.prefill(prompt(engine), method="link0").report
        assert first.reused == 0 and all(use.missing for use in first.chunks)
        assert len(first.fallbacks) == len(PASSAGES)
        engine.flush()
        second = engine.prefill(prompt(engine), method="link0").report
        assert second.reused > 500 and second.fallbacks == []


def test_encodings_are_never_mixed_up():
    engine = Engine(tiny_backbone("llama"), method="naive")
    engine.ensure(PASSAGES)
    before = engine.prefill(prompt(engine), method="naive").logits
    engine.ensure(PASSAGES, method="promptcache")
    bare = engine.prefill(prompt(engine), method="promptcache").logits
    assert torch.equal(engine.prefill(prompt(engine), method="naive").logits, before)
    assert distance(bare, before) > 1e-3


def test_forgetting_covers_every_encoding():
    engine = Engine(tiny_backbone("llama"), method="naive")
    methods = ("naive", "link0", "cachecraft")
    for name in methods:
        engine.ensure(PASSAGES, method=name)
        engine.prefill(prompt(engine), method=name)
    engine.forget(PASSAGES[:1])
    for name in methods:
        assert len(engine.prefill(prompt(engine), method=name).report.chunks) in (0, len(PASSAGES) - 1)
    for name in ("naive", "link0"):
        assert all(entry.text != PASSAGES[0] for entry in engine.library_of(name).store.entries())
    assert not engine.variants_of("cachecraft", PASSAGES[0])


# ---- order -----------------------------------------------------------------------------------------------------------


def test_reordering_leaves_the_ratio_what_it_is(engine):
    engine.ensure(PASSAGES, method="auto")
    engine.fuse({PASSAGES[2]: PASSAGES[1:2], PASSAGES[3]: PASSAGES[1:3]}, method="auto")
    for reorder in (False, True):
        report = engine.prefill(prompt(engine), method=resolve("auto", reorder=reorder)).report
        assert 0 < report.fit < 1 and report.requested_ratio == pytest.approx(0.2 + (0.04 - 0.2) * report.fit)


def test_reordering_puts_the_chunk_the_question_asks_for_last(engine):
    engine.ensure(PASSAGES)
    plain = engine.prefill(prompt(engine), method="infoflow")
    moved = engine.prefill(prompt(engine), method=resolve("infoflow", reorder=True))
    keys = [[use.key for use in prefill.report.chunks] for prefill in (plain, moved)]
    assert sorted(keys[0]) == sorted(keys[1]) and keys[0] != keys[1]
    assert moved.layout.prompt != plain.layout.prompt
    for passage in PASSAGES:
        assert moved.layout.prompt.count(passage) == 1
    assert len(moved.layout.prompt) == len(plain.layout.prompt)


def test_a_chunk_that_is_exact_where_it_stands_moves_as_well(engine):
    engine.ensure(PASSAGES, method="naive")
    moved = set()
    for texts in permutations(PASSAGES[:3]):
        asked = engine.backbone.chat([{"role": "user", "content": "\n\n".join(texts) + "\n\nWho built it?"}])
        assert engine.prefill(asked, method="naive").report.chunks[0].in_place
        result = engine.prefill(asked, method="infoflow:reorder=True")
        moved.add(min(range(3), key=lambda n: result.layout.prompt.index(texts[n])))
    assert moved > {0}  # before, what stood first stayed first whatever the question pointed at


# ---- reductions ------------------------------------------------------------------------------------------------------


def test_ape_without_scaling_is_plain_reuse(engine):
    engine.ensure(PASSAGES)
    ape = resolve("ape", temperature=1.0, scale=1.0, positions="global")
    naive = engine.prefill(prompt(engine), method="naive").logits
    assert torch.equal(engine.prefill(prompt(engine), method=ape).logits, naive)
    almost = resolve("ape", temperature=1.0 + 1e-7, scale=1.0, positions="global")  # through the shaped attention
    assert distance(engine.prefill(prompt(engine), method=almost).logits, naive) < 1e-4


def test_sel_with_every_chunk_is_plain_reuse(engine):
    engine.ensure(PASSAGES)
    naive = engine.prefill(prompt(engine), method="naive").logits
    assert distance(engine.prefill(prompt(engine), method=resolve("sel", keep=5)).logits, naive) < 1e-4
    assert distance(engine.prefill(prompt(engine), method=resolve("sel", keep=2)).logits, naive) > 1e-3


def test_psr_without_scaling_is_cacheblend_behind_blanks(engine):
    engine.ensure(PASSAGES, method="psr")
    psr = resolve("psr", temperature=1.0, scale=1.0)
    cacheblend = dataclasses.replace(METHODS["cacheblend"], encode=Blanks())
    ours = engine.prefill(prompt(engine), method=psr).logits
    assert torch.equal(ours, engine.prefill(prompt(engine), method=cacheblend).logits)


# ---- forward in stages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_in_stages_are_the_whole_forward(kind):
    backbone = tiny_backbone(kind)
    ids, rows = torch.randint(0, 256, (70,)), torch.arange(70)
    once, staged = backbone.canvas(70), backbone.canvas(70)
    expected = backbone.forward(ids, rows, once, logits=70)
    stream = backbone.advance(ids, rows, staged, 0, 1)
    stream = backbone.advance(stream, rows, staged, 1, 3)
    logits = backbone.forward(stream, rows, staged, first=3, logits=70)
    assert torch.equal(logits, expected)
    assert torch.equal(once.keys, staged.keys)
