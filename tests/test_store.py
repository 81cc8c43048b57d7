"""Every store of chunk KV, in memory, on disk or in tiers: what is put is got, bit for bit, by its own key only."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import HUGE, MODEL, fill, later, make, open_disk, path_of, same

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.store import ChunkStore, DiskStore, MemoryStore, TieredStore, format
from cacheclip_rag.store.memory import MemoryBudget


@pytest.fixture(params=["memory", "disk", "tiered"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ChunkStore:
    if request.param == "memory":
        return MemoryStore(HUGE)
    if request.param == "disk":
        return open_disk(tmp_path)
    return TieredStore(MemoryStore(HUGE), open_disk(tmp_path))


def test_what_is_put_is_got_bit_for_bit(any_store: ChunkStore) -> None:
    chunks = fill(any_store, 5)
    for key, chunk in chunks:
        got = any_store.get(key)
        assert got is not None and same(got, chunk) and key in any_store
    assert {(entry.key, entry.text) for entry in any_store.entries()} == {(key, chunk.text) for key, chunk in chunks}
    stats = any_store.stats()
    assert stats.entries == 5 and stats.nbytes >= 5 * chunks[0][1].nbytes
    assert all(entry.nbytes >= chunks[0][1].nbytes for entry in any_store.entries())


def test_what_was_never_put_or_was_deleted_is_a_miss(any_store: ChunkStore) -> None:
    (one, _), (two, chunk) = fill(any_store, 2)
    absent = MODEL.key("absent")
    assert any_store.get(absent) is None and absent not in any_store
    any_store.delete([one, absent])
    any_store.delete([])
    assert any_store.get(one) is None and one not in any_store
    assert same(any_store.get(two), chunk)
    assert [entry.key for entry in any_store.entries()] == [two]
    assert any_store.stats().entries == 1
    assert any_store.put(one, make("chunk number 0")) and any_store.get(one) is not None


def test_a_second_put_changes_nothing(any_store: ChunkStore) -> None:
    ((key, chunk),) = fill(any_store, 1)
    before = any_store.stats()
    assert any_store.put(key, make(chunk.text, seed=99))
    assert same(any_store.get(key), chunk)
    assert (any_store.stats().entries, any_store.stats().nbytes) == (before.entries, before.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_bit_of_every_number_survives(any_store: ChunkStore, dtype: torch.dtype) -> None:
    chunk = make("special numbers", dtype=dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40], dtype=dtype)
    chunk.keys[0, 0, :, 0] = special
    if dtype == torch.float32:
        chunk.keys.view(torch.int32)[0, 0, 0, 1] = 0x7FC12345  # a NaN with a payload
    key = MODEL.key(chunk.text)
    assert any_store.put(key, chunk)
    assert same(any_store.get(key), chunk)


def test_views_are_stored_by_value(any_store: ChunkStore) -> None:
    big = make("a view", tokens=12)
    view = replace(
        big, ids=big.ids[::2], offsets=big.offsets[::2], keys=big.keys[:, :, ::2], values=big.values[:, :, ::2]
    )
    key = MODEL.key(view.text)
    assert any_store.put(key, view)
    assert same(any_store.get(key), view)


def test_tensors_that_share_memory_are_stored_each(tmp_path: Path) -> None:
    chunk = make("shared")
    chunk = replace(chunk, values=chunk.keys, extra={"first": chunk.ids[:8], "pairs": chunk.offsets[:, 0]})
    store = open_disk(tmp_path)
    assert store.put(MODEL.key("shared"), chunk)
    got = store.get(MODEL.key("shared"))
    assert same(got, chunk) and got is not None and torch.equal(got.extra["pairs"], chunk.offsets[:, 0])


TEXTS = ["a\0b", "🦊👩‍👧", "שלום \u202eabc", '"}],\\u0022 </script>\n\t\x1b', "e\u0301", "x" * 200_000, "\u2028\x85"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(any_store: ChunkStore, tmp_path: Path, text: str) -> None:
    chunk, key = make(text), MODEL.key(text)
    assert any_store.put(key, chunk)
    assert same(any_store.get(key), chunk)
    if not isinstance(any_store, MemoryStore):
        reopened = open_disk(tmp_path)
        assert [entry.text for entry in reopened.entries()] == [text]
        assert same(reopened.get(key), chunk)


def test_a_text_that_no_file_can_hold_is_not_kept_and_does_no_harm(store: DiskStore) -> None:
    text = "lone \ud800 surrogate"
    key = MODEL.key(text)
    assert store.put(key, make(text)) is False
    assert store.get(key) is None and store.stats().failed_puts == 1
    assert len(fill(store, 2)) == 2
    tiers = TieredStore(MemoryStore(HUGE), store)
    assert tiers.put(key, make(text)) is True and tiers.get(key) is not None  # memory can hold it


def test_a_chunk_that_memory_cannot_hold_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(format, "dump", fail)
    store = open_disk(tmp_path)
    assert store.put(MODEL.key("text 0"), make("text 0")) is False and store.stats().failed_puts == 1


def test_eight_threads_hammering(tmp_path: Path) -> None:
    chunks = {MODEL.key(f"text {i}"): make(f"text {i}", seed=i) for i in range(24)}
    size = len(format.dump(*next(iter(chunks.items())), MODEL))
    memory, far = MemoryStore(5 * chunks[MODEL.key("text 0")].nbytes), open_disk(tmp_path, cap=12 * size)
    tiers = TieredStore(memory, far)
    errors: list[str] = []
    until = time.monotonic() + 2.0

    def hammer(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < until and not errors:
                key = rng.choice(list(chunks))
                action = rng.random()
                if action < 0.45:
                    got = tiers.get(key)
                    if got is not None and not same(got, chunks[key]):
                        errors.append("another chunk's KV")
                elif action < 0.85:
                    if not tiers.put(key, chunks[key]):
                        errors.append("not kept")
                elif action < 0.95:
                    tiers.delete([key])
                else:
                    for entry in tiers.entries():
                        if chunks[entry.key].text != entry.text:
                            errors.append("another chunk's text")
                    tiers.stats()
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert memory.stats().nbytes <= memory.cap
    assert memory.stats().nbytes == sum(entry.nbytes for entry in memory.entries())
    assert not list(far.path.glob(".tmp-*")) and not list(far.path.glob("*.bad"))
    fresh = open_disk(tmp_path)
    assert {entry.key for entry in fresh.entries()} == {entry.key for entry in far.entries()}
    for entry in fresh.entries():
        assert same(fresh.get(entry.key), chunks[entry.key])


def test_every_field_of_a_namespace_counts_and_their_order_does_not() -> None:
    fields = {"a": 1, "b": "x", "c": [1, 2], "d": {"e": None}}
    keys = {Namespace(fields | change).key("t") for change in ({}, {"a": 2}, {"b": "y"}, {"c": [2, 1]}, {"d": {}})}
    assert len(keys) == 5
    assert Namespace(dict(reversed(fields.items()))).digest == Namespace(fields).digest


def test_the_key_of_a_text_is_a_hex_digest_whatever_the_text() -> None:
    for text in (*TEXTS, "", "../../etc/passwd", "lone \ud800"):
        key = MODEL.key(text)
        assert len(key) == 64 and set(key) <= set("0123456789abcdef")
    assert len({MODEL.key(text) for text in ("a\ud800", "a\ud801", "a?", "a", "A")}) == 5


def test_the_context_a_chunk_was_computed_in_is_part_of_what_it_is(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    alone, fused = make("text"), replace(make("text", seed=1), context=("one", "two"))
    keys = [MODEL.key("text", context) for context in ((), ("one", "two"), ("two", "one"), ("onetwo",))]
    assert len(set(keys)) == 4
    assert store.put(keys[0], alone) and store.put(keys[1], fused)
    again = open_disk(tmp_path)
    assert same(again.get(keys[0]), alone) and same(again.get(keys[1]), fused)
    assert {entry.key: entry.context for entry in again.entries()} == {keys[0]: (), keys[1]: ("one", "two")}
    got = again.get(keys[1])
    assert got is not None and got.context == ("one", "two")
    path_of(store, keys[2]).write_bytes(path_of(store, keys[1]).read_bytes())  # under the name of another context
    assert open_disk(tmp_path).get(keys[2]) is None
    assert not store.put(keys[3], replace(alone, context=("\ud800",)))  # no valid Unicode: not kept, nothing raised


@pytest.mark.parametrize("context", ["[1]", "{}", "[", '"one"'])
def test_a_context_that_is_no_list_of_texts_is_damage(context: str) -> None:
    with pytest.raises(format.Rejected, match="damaged header"):
        format.context({"company": context})


def test_memory_stays_within_its_cap_and_drops_what_was_used_longest_ago() -> None:
    size = make("chunk number 0").nbytes
    memory = MemoryStore(3 * size)
    keys = [key for key, _ in fill(memory, 3)]
    assert memory.get(keys[0]) is not None
    assert memory.put(MODEL.key("new"), make("new"))
    assert keys[0] in memory and keys[1] not in memory and keys[2] in memory
    assert memory.stats().nbytes == 3 * size == memory.cap and memory.stats().evicted == 1
    assert memory.put(MODEL.key("huge"), make("huge", tokens=100)) is False
    assert memory.stats().entries == 3 and memory.stats().failed_puts == 1
    memory.delete(keys)
    assert memory.stats().entries == 1 and memory.stats().nbytes == size
    assert memory.refresh() is False


def test_stores_in_one_memory_share_its_bytes_and_the_oldest_chunk_goes_whoever_s_it_is() -> None:
    size = make("chunk number 0").nbytes
    memory = MemoryBudget(3 * size)
    one, other = MemoryStore(memory), MemoryStore(memory)
    keys = [key for key, _ in fill(one, 2)]
    assert other.get(keys[0]) is None and keys[0] not in other and not list(other.entries())
    fill(other, 1)  # the same key is another chunk there
    assert one.get(keys[0]) is not None
    fill(other, 2)
    assert keys[0] in one and keys[1] not in one and len(list(other.entries())) == 2
    assert (one.stats().evicted, one.stats().nbytes, one.stats().entries) == (1, size, 1)
    assert (other.stats().evicted, other.stats().nbytes, other.stats().entries) == (0, 2 * size, 2)
    assert memory.nbytes == 3 * size
    other.delete(keys)
    assert memory.nbytes == size == one.stats().memory_bytes and keys[0] in one


def test_memory_counts_hits_and_misses() -> None:
    memory = MemoryStore(HUGE)
    ((key, _),) = fill(memory, 1)
    memory.get(key), memory.get(key), memory.get("absent")
    stats = memory.stats()
    assert (stats.hits, stats.misses) == (2, 1)
    memory.get(key)
    assert stats.hits == 2, "a snapshot"


def test_the_nearer_tiers_take_a_copy_of_what_a_farther_one_serves(tmp_path: Path) -> None:
    nearest, near, far = MemoryStore(HUGE), MemoryStore(HUGE), open_disk(tmp_path)
    ((key, chunk),) = fill(far, 1)
    tiers = TieredStore(nearest, near, far)
    assert key in tiers and key not in nearest and key not in near
    got = tiers.get(key)
    assert got is not None and same(got, chunk) and key in nearest and key in near
    path_of(far, key).unlink()
    assert same(tiers.get(key), chunk)


def test_the_far_tier_keeps_what_the_near_one_evicts(tmp_path: Path) -> None:
    memory, far = MemoryStore(2 * make("x").nbytes), open_disk(tmp_path)
    tiers = TieredStore(memory, far)
    chunks = fill(tiers, 6)
    assert memory.stats().entries == 2 and far.stats().entries == 6 == tiers.stats().entries
    for key, chunk in chunks:
        assert same(tiers.get(key), chunk)
    assert sorted(entry.key for entry in tiers.entries()) == sorted(key for key, _ in chunks)


def test_deleting_deletes_in_every_tier(tmp_path: Path) -> None:
    memory, far = MemoryStore(HUGE), open_disk(tmp_path)
    tiers = TieredStore(memory, far)
    (one, _), (two, _) = fill(tiers, 2)
    tiers.delete([one])
    assert one not in memory and one not in far and one not in tiers and two in tiers
    assert tiers.get(one) is None and [entry.key for entry in tiers.entries()] == [two]


def test_a_put_succeeds_when_any_tier_keeps_it(tmp_path: Path) -> None:
    chunk = make("x")
    key = MODEL.key("x")
    tiers = TieredStore(MemoryStore(1), open_disk(tmp_path))
    assert tiers.put(key, chunk) and key in tiers
    assert TieredStore(MemoryStore(1), MemoryStore(1)).put(key, chunk) is False


def test_refreshing_tiers_refreshes_all_of_them(tmp_path: Path) -> None:
    tiers = TieredStore(MemoryStore(HUGE), open_disk(tmp_path))
    other = open_disk(tmp_path)
    ((key, _),) = fill(other, 1)
    later(other.path)
    assert key not in tiers and tiers.refresh() is True and key in tiers
