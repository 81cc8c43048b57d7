"""The engine's invariants, on tiny models of every supported shape, in float32 and bfloat16."""

from __future__ import annotations

import pytest
import torch
from exempt import NEEDS_A_FOLDER, OTHER_BUDGET, REPAIRS_NOTHING, but
from tiny import CONFIGS, PASSAGES, tiny_backbone, tiny_model

from cacheclip_rag import METHODS, Engine
from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.kv.encode import Isolated
from cacheclip_rag.kv.library import Library
from cacheclip_rag.methods.auxiliary import Auxiliary
from cacheclip_rag.model.backbone import Backbone
from cacheclip_rag.store import MemoryStore

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2}
shapes = pytest.mark.parametrize("kind", CONFIGS)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative error of ``a``."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def native_logits(kind: str, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own logits ``[T, V]``, eager attention."""
    with torch.inference_mode():
        return tiny_model(kind, dtype)(input_ids=ids[None], use_cache=False).logits[0].float()


def random_ids(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def encoded(backbone: Backbone, prefix: torch.Tensor, ids: torch.Tensor) -> ChunkKV:
    """The chunk's KV behind ``prefix``, and nothing else."""
    canvas = backbone.canvas(len(prefix) + len(ids))
    everything = torch.cat([prefix, ids])
    backbone.forward(everything, torch.arange(len(everything)), canvas, logits=0)
    keys, values = canvas.read(slice(len(prefix), None))
    return ChunkKV("", ids, torch.zeros(len(ids), 2, dtype=torch.long), keys, values, position=len(prefix))


def stale_canvas(backbone: Backbone, prefix: torch.Tensor, chunks: list[torch.Tensor], capacity: int):
    """Chunks encoded apart and placed one after another behind the prefix."""
    canvas = backbone.canvas(capacity)
    backbone.forward(prefix, torch.arange(len(prefix)), canvas, logits=0)
    row = len(prefix)
    for ids in chunks:
        canvas.place(encoded(backbone, prefix, ids), slice(0, len(ids)), row)
        row += len(ids)
    return canvas


@shapes
@dtypes
def test_recomputing_every_row_of_a_stale_canvas_is_full_prefill(kind, dtype):
    backbone = tiny_backbone(kind, dtype)
    prefix, chunks, question = random_ids(9), [random_ids(70, 2), random_ids(90, 3)], random_ids(12, 4)
    ids = torch.cat([prefix, *chunks, question])
    canvas = stale_canvas(backbone, prefix, chunks, len(ids))
    rows = torch.arange(len(ids))
    ours = backbone.forward(ids, rows, canvas, logits=len(ids))
    assert distance(ours, native_logits(kind, dtype, ids)) < TOLERANCE[dtype]


@shapes
def test_recomputing_too_little_shows(kind):
    """The test above would pass for a canvas that ignores its stale rows; this one would not."""
    backbone = tiny_backbone(kind)
    prefix, chunks, question = random_ids(9), [random_ids(70, 2), random_ids(90, 3)], random_ids(12, 4)
    ids = torch.cat([prefix, *chunks, question])
    canvas = stale_canvas(backbone, prefix, chunks, len(ids))
    rows = torch.arange(len(ids) - 12, len(ids))
    ours = backbone.forward(ids[rows], rows, canvas, logits=12)
    assert distance(ours, native_logits(kind, torch.float32, ids)[-12:]) > 1e-2


@shapes
@dtypes
def test_scattered_rows_over_exact_kv_change_nothing(kind, dtype):
    """Any subset of rows may be recomputed: over KV that is right they give the same logits and the same KV."""
    backbone = tiny_backbone(kind, dtype)
    ids = random_ids(600)  # more than two blocks of rows
    canvas = backbone.canvas(len(ids))
    backbone.forward(ids, torch.arange(len(ids)), canvas, logits=0)
    before = canvas.read(slice(None))
    rows = torch.randperm(len(ids) - 1, generator=torch.Generator().manual_seed(5))[:300].sort().values
    rows = torch.cat([rows, torch.tensor([len(ids) - 1])])
    ours = backbone.forward(ids[rows], rows, canvas, logits=len(rows))
    assert distance(ours, native_logits(kind, dtype, ids)[rows]) < TOLERANCE[dtype]
    assert distance(canvas.read(slice(None))[0], before[0]) < TOLERANCE[dtype]


@shapes
@dtypes
def test_a_chunk_right_after_its_prefix_is_exact(kind, dtype):
    backbone = tiny_backbone(kind, dtype)
    prefix, chunk, question = random_ids(9), random_ids(70, 2), random_ids(12, 4)
    ids = torch.cat([prefix, chunk, question])
    canvas = stale_canvas(backbone, prefix, [chunk], len(ids))
    placed = canvas.keys[:, 0, :, len(prefix) : len(prefix) + len(chunk)]
    assert torch.equal(placed, encoded(backbone, prefix, chunk).keys), "placing it where it was encoded is a copy"
    rows = torch.arange(len(ids) - 12, len(ids))
    ours = backbone.forward(ids[rows], rows, canvas, logits=12)
    assert distance(ours, native_logits(kind, dtype, ids)[-12:]) < TOLERANCE[dtype]


@shapes
def test_rotating_back_and_forth_is_the_identity(kind):
    rotary = tiny_backbone(kind).rotary
    keys = torch.randn(4, 2, 50, 16)
    for delta in (1, 7, 900, -13):
        assert torch.allclose(rotary.rotate(rotary.rotate(keys, delta), -delta), keys, atol=1e-5)
    twice = rotary.rotate(rotary.rotate(keys, 5), 12)
    assert torch.allclose(twice, rotary.rotate(keys, 17), atol=1e-5)


@shapes
@dtypes
def test_a_placed_key_equals_a_freshly_computed_one(kind, dtype):
    """Moving a stored chunk by rotation gives what the model computes for the same chunk at those positions."""
    backbone = tiny_backbone(kind, dtype)
    chunk, shift = random_ids(40), 333
    here, there = backbone.canvas(40), backbone.canvas(40)
    rows = torch.arange(40)
    backbone.forward(chunk, rows, here, logits=0)
    backbone.forward(chunk, rows, there, positions=rows + shift, logits=0)
    moved = backbone.rotary.rotate(here.keys[:, 0], shift)
    assert distance(moved, there.keys[:, 0]) < TOLERANCE[dtype]


# ---- through the engine -------------------------------------------------------------------------------------------


def prompt_of(backbone: Backbone, passages: list[str], question: str = "Who drove the last train?") -> str:
    return backbone.chat([{"role": "user", "content": "Read.\n\n" + "\n\n".join(passages) + f"\n\n{question}"}])


def engine_with_auxiliary(kind: str, dtype: torch.dtype = torch.float32) -> Engine:
    helper = Backbone(tiny_model("qwen3", torch.float32, seed=7), tiny_backbone().tokenizer)
    return Engine(tiny_backbone(kind, dtype), auxiliary=helper)


@shapes
@pytest.mark.parametrize("method", but(NEEDS_A_FOLDER))
def test_every_method_at_ratio_one_gives_transformers_greedy_answer(kind, method):
    engine = engine_with_auxiliary(kind)
    engine.ensure(PASSAGES)
    prompt = prompt_of(engine.backbone, PASSAGES)
    ids = engine.backbone.tokenise(prompt).ids
    with torch.inference_mode():
        model = tiny_model(kind)
        expected = model.generate(ids[None], max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    answer = engine.generate(prompt, method=method, recompute_ratio=1.0, max_new_tokens=12)
    assert list(answer.ids) == expected


@pytest.mark.parametrize("method", but(NEEDS_A_FOLDER))
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.33, 0.9])
def test_every_prompt_token_is_accounted_for_exactly_once(method, ratio):
    engine = engine_with_auxiliary("qwen2")
    engine.ensure(PASSAGES[:4], method=method)
    prompt = prompt_of(engine.backbone, PASSAGES)
    report = engine.generate(prompt, method=method, recompute_ratio=ratio, max_new_tokens=2).report
    assert report.fallbacks == []
    assert report.prompt_tokens == len(engine.backbone.tokenise(prompt))
    assert report.prompt_tokens == report.prefix + report.reused + report.recomputed + report.fresh
    if METHODS[method].ahead and method != "full":
        known = sum(use.reused + use.recomputed for use in report.chunks)
        assert len(report.chunks) == 4 and known == report.reused + report.recomputed
        assert known == sum(len(p) for p in PASSAGES[:4]), "one byte, one token: every byte of a known chunk is reused"
        if method not in OTHER_BUDGET:
            assert report.recomputed == int(ratio * known)
        elif method in REPAIRS_NOTHING:
            assert report.recomputed == 0


@pytest.mark.parametrize("method", ["cacheclip", "query_guided", "naive"])
def test_the_store_is_bit_identical_after_requests(method):
    engine = engine_with_auxiliary("llama")
    engine.ensure(PASSAGES)
    stores = [engine.library.store, engine.auxiliary.library.store]
    before = [
        {e.key: (store.get(e.key).keys.clone(), store.get(e.key).values.clone()) for e in store.entries()}
        for store in stores
    ]
    for order in (PASSAGES, PASSAGES[::-1], PASSAGES[2:]):
        engine.generate(prompt_of(engine.backbone, order), method=method, max_new_tokens=4)
    for store, kept in zip(stores, before, strict=True):
        assert {e.key for e in store.entries()} == set(kept)
        for key, (keys, values) in kept.items():
            assert torch.equal(store.get(key).keys, keys) and torch.equal(store.get(key).values, values)


def test_a_prompt_that_begins_with_the_shared_prefix_and_one_chunk_is_exact_without_recompute():
    engine = engine_with_auxiliary("llama")
    engine.ensure(PASSAGES[:1])
    prompt = engine.backbone.shared_prefix() + PASSAGES[0] + "\n\nWho?<|im_end|>\n<|im_start|>assistant\n"
    naive = engine.prefill(prompt, method="naive")
    full = engine.prefill(prompt, method="full")
    assert naive.report.chunks[0].in_place and naive.report.reused == len(PASSAGES[0])
    assert distance(naive.logits, full.logits) < 1e-4
    # Nothing of an exact chunk is worth recomputing.
    assert engine.prefill(prompt, method="query_guided", recompute_ratio=0.5).report.recomputed == 0


def test_more_recompute_comes_closer_to_full_prefill():
    engine = engine_with_auxiliary("llama")
    engine.ensure(PASSAGES)
    prompt = prompt_of(engine.backbone, PASSAGES)
    full = engine.prefill(prompt, method="full").logits
    errors = [
        distance(engine.prefill(prompt, method="query_guided", recompute_ratio=r).logits, full) for r in (0, 0.5, 0.99)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[0] > 0.05


def test_bare_chunks_differ_from_chunks_behind_the_shared_prefix():
    backbone = tiny_backbone()
    keep = lambda namespace: MemoryStore(1 << 30)  # noqa: E731
    bare, shared = Library(backbone, Isolated(prefix=""), keep), Library(backbone, Isolated(), keep)
    assert bare.key(PASSAGES[0]) != shared.key(PASSAGES[0])
    assert bare.ensure(PASSAGES[0]).position == 0
    assert shared.ensure(PASSAGES[0]).position == len(shared.prefix_ids) > 0


def test_the_auxiliary_models_cached_pass_equals_its_joint_pass_for_one_chunk():
    """With one chunk behind its own prefix nothing is missing, so reused KV must give the scores of a full pass."""
    backbone = tiny_backbone("qwen3")
    auxiliary = Auxiliary(Library(backbone, Isolated(), lambda namespace: MemoryStore(1 << 30)))
    question = "Who drove the last train?"
    (ours,) = auxiliary.score([PASSAGES[2]], question)
    prefix = auxiliary.library.prefix_ids
    chunk, tail = backbone.tokenise(PASSAGES[2]).ids, backbone.tokenise("\n\n" + question).ids
    ids = torch.cat([prefix, chunk, tail])
    with torch.inference_mode():
        attention = tiny_model("qwen3")(input_ids=ids[None], output_attentions=True).attentions[-1][0]
    expected = attention[:, -len(tail) :, len(prefix) : len(prefix) + len(chunk)].mean(dim=(0, 1))
    assert torch.allclose(torch.from_numpy(ours.scores), expected, atol=1e-5)
