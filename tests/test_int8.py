"""Chunk KV in 8 bits: what comes back, what it takes up, and what a prompt notices of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import PASSAGES, tiny_backbone, tiny_model

from cacheclip_rag import Engine
from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.store import DiskStore, Int8Store, MemoryStore, format
from cacheclip_rag.store.int8 import FIRST, pack, unpack

HUGE = 1 << 40
MODEL = Namespace({"format": format.FORMAT, "model": "one", "kv_dtype": "int8"})


def make(tokens: int = 40, dtype: torch.dtype = torch.float32, text: str = "text") -> ChunkKV:
    """KV as models have it: some channels of the keys far from 0, a first token far from all others."""
    kv = torch.randn((2, 3, 2, tokens, 16), generator=torch.Generator().manual_seed(0))
    kv[0] += torch.linspace(-100, 100, 16)
    kv[:, :, :, 0] *= 50
    kv = kv.to(dtype)
    return ChunkKV(text, torch.arange(tokens), torch.arange(2 * tokens).view(tokens, 2), kv[0], kv[1], 3)


def prompt_of(engine: Engine, passages: list[str]) -> str:
    content = "Context:\n" + "\n\n".join(passages) + "\n\nQuestion: Who drove the last train?"
    return engine.backbone.chat([{"role": "user", "content": content}])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_comes_back_within_half_a_step(dtype: torch.dtype) -> None:
    chunk = make(dtype=dtype)
    packed = pack(chunk)
    back = unpack(packed)
    assert packed.keys.dtype == packed.values.dtype == torch.int8
    assert back.keys.dtype == back.values.dtype == dtype and not back.packing
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-22
    for name, one, other in (("key", back.keys, chunk.keys), ("value", back.values, chunk.values)):
        bound = packed.packing[f"{name}_scales"] * 0.501 + other.float().abs() * rounding
        assert bool(((one.float() - other.float()).abs() <= bound)[:, :, FIRST:].all())
    # A bias of 100 costs the keys nothing, nor does a token of fifty times the size.
    later = chunk.keys[:, :, FIRST:].float()
    assert bool((packed.packing["key_scales"] <= (later.amax(2, True) - later.amin(2, True)) / 253).all())
    assert torch.equal(back.keys[:, :, :FIRST], chunk.keys[:, :, :FIRST])
    assert torch.equal(back.values[:, :, :FIRST], chunk.values[:, :, :FIRST])


@pytest.mark.parametrize("tokens", [1, FIRST, FIRST + 1])
def test_short_chunks_and_numbers_that_are_all_the_same(tokens: int) -> None:
    chunk = make(tokens)
    assert distance(unpack(pack(chunk)).keys, chunk.keys) < 1e-6
    flat = replace(chunk, keys=torch.full_like(chunk.keys, 7.25), values=torch.zeros_like(chunk.values))
    back = unpack(pack(flat))
    assert torch.equal(back.keys, flat.keys) and torch.equal(back.values, flat.values)


def test_packing_what_was_unpacked_changes_little_more() -> None:
    once = unpack(pack(make()))
    assert distance(unpack(pack(once)).keys, once.keys) < 1e-4


def test_it_takes_half_the_bytes_on_disk_and_in_memory(tmp_path: Path) -> None:
    kv = torch.randn((2, 8, 2, 512, 64), generator=torch.Generator().manual_seed(0)).bfloat16()
    chunk = ChunkKV("text", torch.arange(512), torch.zeros(512, 2, dtype=torch.long), kv[0], kv[1], 0)
    key = MODEL.key("text")
    sizes = []
    for number, wrap in enumerate((lambda store: store, Int8Store)):
        for inner in (MemoryStore(HUGE), DiskStore(tmp_path / str(number), MODEL, HUGE, sync=False)):
            store = wrap(inner)
            assert store.put(key, chunk)
            sizes.append(store.stats().nbytes)
    assert 0.5 < sizes[2] / sizes[0] < 0.55 and 0.5 < sizes[3] / sizes[1] < 0.55


def test_what_is_kept_survives_the_disk_bit_for_bit(tmp_path: Path) -> None:
    chunk, key = make(), MODEL.key("text")
    Int8Store(DiskStore(tmp_path, MODEL, HUGE, sync=False)).put(key, chunk)
    got = Int8Store(DiskStore(tmp_path, MODEL, HUGE, sync=False)).get(key)
    expected = unpack(pack(chunk))
    assert got is not None and torch.equal(got.keys, expected.keys) and torch.equal(got.values, expected.values)


def test_kv_that_is_not_finite_is_not_kept() -> None:
    chunk = make()
    chunk.keys[0, 0, 9, 3] = torch.inf
    store = Int8Store(MemoryStore(HUGE))
    assert not store.put(MODEL.key("text"), chunk) and store.get(MODEL.key("text")) is None


_BROKEN = {
    "a scale is not finite": {"key_scales": torch.full((3, 2, 1, 16), torch.nan)},
    "a scale is 0": {"value_scales": torch.zeros(3, 2, 40, 1)},
    "a scale is negative": {"value_scales": -torch.ones(3, 2, 40, 1)},
    "scales of another shape": {"key_scales": torch.ones(3, 2, 1, 1)},
    "scales of another type": {"key_scales": torch.ones(3, 2, 1, 16, dtype=torch.float64)},
    "centres are infinite": {"key_centres": torch.full((3, 2, 1, 16), torch.inf)},
    "first tokens of another number": {"first_keys": torch.zeros(3, 2, FIRST + 1, 16)},
    "first tokens of two types": {"first_values": torch.zeros(3, 2, FIRST, 16, dtype=torch.bfloat16)},
    "first tokens are integers": {
        "first_keys": torch.zeros(3, 2, FIRST, 16, dtype=torch.int32),
        "first_values": torch.zeros(3, 2, FIRST, 16, dtype=torch.int32),
    },
    "something more": {"zeros": torch.zeros(1)},
}


@pytest.mark.parametrize("name", [*_BROKEN, "a scale is missing", "the codes are no int8", "no scales at all"])
def test_a_file_with_scales_that_cannot_be_is_a_miss(tmp_path: Path, name: str) -> None:
    """With a good checksum over them: only a bug or a forger writes such a file."""
    packed, key = pack(make()), MODEL.key("text")
    if name == "a scale is missing":
        packed = replace(packed, packing={k: v for k, v in packed.packing.items() if k != "key_scales"})
    elif name == "the codes are no int8":
        packed = replace(packed, keys=packed.keys.to(torch.int16), values=packed.values.to(torch.int16))
    elif name == "no scales at all":
        packed = replace(packed, packing={})
    else:
        packed = replace(packed, packing={**packed.packing, **_BROKEN[name]})
    disk = DiskStore(tmp_path, MODEL, HUGE, sync=False)
    (disk.path / f"{key}.safetensors").write_bytes(format.dump(key, packed, MODEL))
    disk.refresh()
    assert Int8Store(disk).get(key) is None and disk.stats().rejected == {"shapes": 1}


def test_a_flipped_bit_in_the_scales_is_not_served(tmp_path: Path) -> None:
    key = MODEL.key("text")
    disk = DiskStore(tmp_path, MODEL, HUGE, sync=False)
    Int8Store(disk).put(key, make())
    path = disk.path / f"{key}.safetensors"
    data = path.read_bytes()
    scales = pack(make()).packing["key_scales"].numpy().tobytes()
    place = data.index(scales) + 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert Int8Store(disk).get(key) is None and disk.stats().rejected == {"checksum": 1}


def test_the_two_kinds_do_not_see_each_other_s_chunks(tmp_path: Path) -> None:
    backbone = tiny_backbone()
    with (
        Engine(backbone, method="naive", store=tmp_path) as plain,
        Engine(backbone, method="naive", store=tmp_path, kv_dtype="int8") as small,
    ):
        assert plain.library.namespace.digest != small.library.namespace.digest
        assert plain.ensure(PASSAGES).encoded == small.ensure(PASSAGES).encoded == len(PASSAGES)
    with Engine(backbone, method="naive", store=tmp_path, kv_dtype="int8") as again:
        assert again.ensure(PASSAGES).encoded == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_a_prompt_hardly_notices(kind: str) -> None:
    backbone = tiny_backbone(kind)
    plain, small = (Engine(backbone, method="naive", kv_dtype=dtype) for dtype in ("auto", "int8"))
    for engine in (plain, small):
        engine.ensure(PASSAGES)
    prompt = prompt_of(plain, PASSAGES)
    one, other, full = (
        plain.prefill(prompt).logits,
        small.prefill(prompt).logits,
        plain.prefill(prompt, method="full").logits,
    )
    assert 0 < distance(other, one) < 0.1 * distance(one, full)
    assert torch.allclose(small.prefill(prompt).logits, other, atol=1e-4)


def test_ratio_one_is_full_prefill_all_the_same() -> None:
    engine = Engine(tiny_backbone(), auxiliary=tiny_backbone("qwen2"), kv_dtype="int8")
    engine.ensure(PASSAGES)
    prompt = prompt_of(engine, PASSAGES)
    ids = engine.backbone.tokenise(prompt).ids
    with torch.inference_mode():
        expected = tiny_model("llama").generate(ids[None], max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert list(engine.generate(prompt, recompute_ratio=1.0, max_new_tokens=12).ids) == expected
    report = engine.generate(prompt, recompute_ratio=0.3, max_new_tokens=2).report
    assert report.fallbacks == [] and report.recomputed > 0


def test_a_chunk_behind_its_prefix_is_not_taken_for_exact() -> None:
    engine = Engine(tiny_backbone(), method="query_guided", kv_dtype="int8")
    engine.ensure(PASSAGES[:1])
    prompt = engine.backbone.shared_prefix() + PASSAGES[0] + "\n\nWho?<|im_end|>\n<|im_start|>assistant\n"
    report = engine.prefill(prompt, recompute_ratio=0.5).report
    assert not report.chunks[0].in_place and report.recomputed == len(PASSAGES[0]) // 2


def test_the_first_use_gives_what_later_ones_give() -> None:
    library = Engine(tiny_backbone(), method="naive", kv_dtype="int8").library
    first = library.ensure(PASSAGES[0])
    assert torch.equal(library.ensure(PASSAGES[0]).keys, first.keys)


def test_an_unknown_kind_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match='"auto" or "int8"'):
        Engine("no such model", kv_dtype="int4")  # type: ignore[arg-type]
