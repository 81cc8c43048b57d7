"""Chunks that are encoded together are what they are when encoded one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from oracles import distance, own
from tiny import CONFIGS, PASSAGES, tiny_backbone

from cacheclip_rag import Engine, PromptError
from cacheclip_rag.corpus import batches
from cacheclip_rag.kv.encode import Blanks, Encoder, Isolated, WithActivations
from cacheclip_rag.model.attention import REFERENCE, SDPA, SparseRows

SIZES = [300, 64, 129, 1, 200]  # of several blocks of rows, of one, of one row


def texts_of(backbone, sizes=SIZES):
    return [(text := "".join(PASSAGES)[7 * n : 7 * n + size], backbone.tokenise(text)) for n, size in enumerate(sizes)]


def encoded(backbone, encoder, texts):
    """Each by itself."""
    prefix_ids, prefix = encoder.prefix_ids(backbone), None
    if len(prefix_ids):
        canvas = backbone.canvas(len(prefix_ids))
        backbone.forward(prefix_ids, torch.arange(len(prefix_ids)), canvas, logits=0)
        prefix = canvas.read(slice(None))
    return encoder.encode(backbone, texts, [prefix] * len(texts))


@pytest.mark.parametrize(
    "encoder", [Isolated(), Isolated(""), Blanks(3), WithActivations(transition_layer=2)], ids=repr
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_together_as_one_by_one(kind: str, encoder: Encoder) -> None:
    backbone = tiny_backbone(kind)
    if isinstance(encoder, WithActivations) and kind == "gemma3":
        pytest.skip("its layers do not run in stages")
    texts = texts_of(backbone)
    together = encoded(backbone, encoder, texts)
    for text, chunk in zip(texts, together, strict=True):
        [alone] = encoded(backbone, encoder, [text])
        assert chunk.text == text[0] and chunk.position == alone.position and torch.equal(chunk.ids, alone.ids)
        assert distance(chunk.keys, alone.keys) < 1e-5 and distance(chunk.values, alone.values) < 1e-5
        assert chunk.extra.keys() == alone.extra.keys()
        assert all(distance(chunk.extra[name], alone.extra[name]) < 1e-5 for name in chunk.extra)


@pytest.mark.parametrize("attention", [SDPA, REFERENCE])
def test_each_is_what_transformers_computes_behind_the_prefix(attention: str) -> None:
    backbone = tiny_backbone("mistral-sliding", attention=attention)
    prefix_ids = Isolated().prefix_ids(backbone)
    for (_, tokens), chunk in zip(texts_of(backbone), encoded(backbone, Isolated(), texts_of(backbone)), strict=True):
        oracle = own("mistral-sliding", torch.cat([prefix_ids, tokens.ids]))
        assert distance(chunk.keys, oracle.keys[:, :, len(prefix_ids) :]) < 1e-5
        assert distance(chunk.values, oracle.values[:, :, len(prefix_ids) :]) < 1e-5


def test_nothing_of_a_neighbour_is_seen() -> None:
    """Not even a little: with another text in front and behind, every bit of a chunk's KV is the same."""
    backbone = tiny_backbone()
    texts = texts_of(backbone, [100, 100, 100])
    other = ("z" * 100, backbone.tokenise("z" * 100))
    here = encoded(backbone, Isolated(), texts)[1]
    there = encoded(backbone, Isolated(), [other, texts[1], other])[1]
    assert torch.equal(here.keys, there.keys) and torch.equal(here.values, there.values)


def test_floors_go_with_neither_probe_nor_shape() -> None:
    with pytest.raises(ValueError, match="floors"):
        SparseRows(torch.arange(4), "cpu", score_mod=object(), floors=torch.zeros(4))  # type: ignore[arg-type]


# ---- through the engine --------------------------------------------------------------------------------------------


def test_batches_keep_order_and_bounds() -> None:
    texts = ["a" * 30, "b" * 60, "c" * 50, "d" * 500, "e", "f"]
    assert list(batches.batches(iter(texts), 100)) == [texts[:2], texts[2:3], texts[3:4], texts[4:]]
    assert [len(batch) for batch in batches.batches(["x"] * 130, 10**9)] == [64, 64, 2]
    assert list(batches.batches([], 100)) == []


def forwards(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts every forward of the encoder has."""
    seen: list[int] = []
    encode = Isolated.encode
    monkeypatch.setattr(
        Isolated, "encode", lambda self, b, texts, p: seen.append(len(texts)) or encode(self, b, texts, p)
    )
    return seen


def test_short_chunks_share_a_forward_and_the_rest_is_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", auxiliary=tiny_backbone("qwen2"))
    seen, steps = forwards(engine, monkeypatch), []
    engine.ensure(PASSAGES[1:2])
    assert seen == [1, 1]  # the primary's and the auxiliary model's
    texts = ["short", *PASSAGES, PASSAGES[0], "y" * 5000]
    result = engine.ensure(iter(texts), progress=steps.append)
    assert seen[2:] == [4, 4] and result.encoded == 4
    assert result.keys == [engine.library.key(text) for text in texts[1:-1]]
    assert [reason[:10] for _, reason in result.skipped] == ["a chunk of", "a chunk of"]
    assert steps == list(range(1, len(texts) + 1))
    assert all(text in engine.auxiliary.library for text in PASSAGES)


def test_too_much_together_is_encoded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided")
    encode = Isolated.encode

    def small(self, backbone, texts, prefix):
        if len(texts) > 1 or texts[0][0] == PASSAGES[2]:
            raise torch.OutOfMemoryError("out of memory")
        return encode(self, backbone, texts, prefix)

    monkeypatch.setattr(Isolated, "encode", small)
    result = engine.ensure(PASSAGES)
    assert result.encoded == len(PASSAGES) - 1 and result.skipped == [(PASSAGES[2][:40], "out of memory")]


def test_an_interrupt_loses_nothing_that_was_finished(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(batches.TOGETHER, "cpu", len(PASSAGES[0]) + len(PASSAGES[1]))
    with Engine(tiny_backbone(), method="query_guided", store=tmp_path) as engine, pytest.raises(KeyboardInterrupt):
        engine.ensure(PASSAGES, progress=lambda done: (_ for _ in ()).throw(KeyboardInterrupt) if done == 2 else None)
    with Engine(tiny_backbone(), method="query_guided", store=tmp_path) as engine:
        seen = forwards(engine, monkeypatch)
        assert engine.ensure(PASSAGES).encoded == len(PASSAGES) - 2 and sum(seen) == len(PASSAGES) - 2


def test_what_a_damaged_file_held_is_encoded_again(tmp_path) -> None:
    with Engine(tiny_backbone(), method="query_guided", store=tmp_path) as engine:
        engine.ensure(PASSAGES)
    [damaged, *_] = [path for path in sorted(tmp_path.rglob("*.safetensors")) if path.stat().st_size > 1000]
    content = bytearray(damaged.read_bytes())
    content[-100] ^= 1
    damaged.write_bytes(content)
    with Engine(tiny_backbone(), method="query_guided", store=tmp_path) as engine:
        for text in PASSAGES:  # as if another process had written them
            engine.index.remove(engine.library.key(text))
        assert engine.ensure(PASSAGES).encoded == 1
        assert all(engine.library.get(engine.library.key(text)) is not None for text in PASSAGES)


def test_what_is_forgotten_while_it_is_encoded_stays_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_backbone(), method="query_guided", auxiliary=tiny_backbone("qwen2"))
    assert engine.auxiliary is not None
    encode, forgetting = engine.auxiliary.library.encode_each, []

    def slow(texts):
        forgetting.append(threading.Thread(target=engine.forget, args=([PASSAGES[0]],)))
        forgetting[0].start()
        forgetting[0].join(0.2)  # it waits for the chunk to be complete
        return encode(texts)

    monkeypatch.setattr(engine.auxiliary.library, "encode_each", slow)
    engine.ensure(PASSAGES[:2])
    forgetting[0].join()
    assert not engine.knows(PASSAGES[0]) and engine.knows(PASSAGES[1])
    assert PASSAGES[0] not in engine.auxiliary.library and engine.library.key(PASSAGES[0]) not in engine.index


def test_a_single_text_still_raises() -> None:
    engine = Engine(tiny_backbone(), method="query_guided")
    with pytest.raises(PromptError, match="64"):
        engine.library.encode("short")
