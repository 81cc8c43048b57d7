"""A store smaller than what is put into it says so and keeps what it began with; one budget counts all KV in memory."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import HUGE, MODEL, OTHER, SIZE, make, open_disk, path_of, put, same, total

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.store import ChunkStore, Int8Store, LRUCache, MemoryBudget, MemoryStore, Place, Remote, TieredStore
from cacheclip_rag.store.remote import RemoteStore

NBYTES = make("text 0").nbytes


# ---- an ingestion under way ----------------------------------------------------------------------------------------


def small(kind: str, folder: Path) -> ChunkStore:
    """Room for four chunks."""
    disk = open_disk(folder, cap=4 * SIZE + 400)
    return {
        "memory": lambda: MemoryStore(4 * NBYTES),
        "disk": lambda: disk,
        "tiers": lambda: TieredStore(MemoryStore(2 * NBYTES), disk),
        "int8": lambda: Int8Store(open_disk(folder, cap=5 * SIZE + 400)),  # chunks this short are larger in int8
    }[kind]()


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers", "int8"])
def test_an_ingestion_does_not_evict_its_own_chunks(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)
    texts = [f"text {number}" for number in range(9)]
    with store.holding():
        kept = [text for text in texts if store.put(MODEL.key(text), make(text)) and kind != "tiers"] or None
        if kept is None:  # memory takes what the disk refuses
            assert isinstance(store, TieredStore)
            kept = [text for text in texts if MODEL.key(text) in store.tiers[-1]]
    assert kept == texts[: len(kept)] and 3 <= len(kept) < 9
    assert all(store.get(MODEL.key(text)) is not None for text in kept)
    assert store.stats().evicted == 0 and store.stats().failed_puts == 9 - len(kept)
    assert store.put(MODEL.key("later"), make("later")), "as before, once it is over"


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers", "int8"])
def test_what_is_put_into_spare_room_evicts_nothing_and_goes_first(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)

    def there() -> set[str]:
        return {entry.text for entry in store.entries()}

    for text in ("text 1", "text 2"):
        assert store.put(MODEL.key(text), make(text))
    before = store.spare_bytes()
    put = [n for n in range(9) if store.put_spare(MODEL.key(f"spare {n}"), make(f"spare {n}"))]
    # A full disk makes room for a tenth of it, so that a tenth is not spare.
    assert put == {"memory": [0, 1], "int8": []}.get(kind, [0]) and 0 <= store.spare_bytes() <= before
    assert there() == {"text 1", "text 2", *(f"spare {n}" for n in put)} and store.stats().evicted == 0
    later = ["text 3", "text 4"]
    assert all(store.put(MODEL.key(text), make(text)) for text in later)
    assert set(later) <= there() and store.stats().evicted
    assert not any(text.startswith("spare") for text in there()), "they went before all others"


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
def test_an_ingestion_evicts_what_was_put_into_spare_room(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)
    with store.holding():
        assert store.put_spare(MODEL.key("spare 0"), make("spare 0"))
        store.put_spare(MODEL.key("spare 1"), make("spare 1"))
        assert all(store.put(MODEL.key(f"text {n}"), make(f"text {n}")) for n in range(3))
    assert {f"text {n}" for n in range(3)} <= {entry.text for entry in store.entries()}


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers"])
def test_what_was_put_into_spare_room_and_is_read_is_one_like_the_others(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)
    store.put(MODEL.key("text 1"), make("text 1"))
    for n in range(2):
        assert store.put_spare(MODEL.key(f"spare {n}"), make(f"spare {n}"))
    assert store.get(MODEL.key("spare 0")) is not None
    for number in (2, 3):
        store.put(MODEL.key(f"text {number}"), make(f"text {number}"))
    there = {entry.text for entry in store.entries()}
    assert "spare 0" in there and "spare 1" not in there


def test_of_several_caches_what_is_in_spare_room_goes_first() -> None:
    memory = MemoryBudget(3)
    old, new = LRUCache[str, str](memory, "old"), LRUCache[str, str](memory, "new")
    assert old.put("a", "a", 1) and new.put("spare", "b", 1, spare=True) and old.put("c", "c", 1)
    assert not new.put("spare too", "d", 1, spare=True)
    assert old.put("e", "e", 1) and len(old) == 3 and len(new) == 0


def test_what_a_full_disk_has_no_spare_room_for_is_not_in_memory_either(tmp_path: Path) -> None:
    store = TieredStore(MemoryStore(HUGE), open_disk(tmp_path, cap=SIZE + 400))
    assert store.put(MODEL.key("text 1"), make("text 1"))
    assert not store.put_spare(MODEL.key("spare 1"), make("spare 1"))
    assert MODEL.key("spare 1") not in store and MODEL.key("text 1") in store


def test_another_process_evicts_first_what_was_put_into_spare_room(tmp_path: Path) -> None:
    first, second = (open_disk(tmp_path, cap=4 * SIZE + 400) for _ in range(2))
    first.put(MODEL.key("text 1"), make("text 1"))
    first.put_spare(MODEL.key("spare 1"), make("spare 1"))
    first.put_spare(MODEL.key("spare 2"), make("spare 2"))
    for number in (2, 3):
        assert second.put(MODEL.key(f"text {number}"), make(f"text {number}"))
    assert {entry.text for entry in second.entries()} == {f"text {number}" for number in (1, 2, 3)}


def test_what_is_put_into_spare_room_is_not_uploaded(tmp_path: Path) -> None:
    remote = RemoteStore(Remote(f"file://{tmp_path / 'remote'}"), MODEL)
    store = TieredStore(MemoryStore(HUGE), remote=remote)
    assert store.put_spare(MODEL.key("spare 1"), make("spare 1")) and store.put(MODEL.key("text 1"), make("text 1"))
    remote.flush()
    assert [path.name[:64] for path in (tmp_path / "remote").rglob("*.safetensors")] == [MODEL.key("text 1")]


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers", "int8"])
def test_what_was_there_and_is_asked_for_stays_and_what_is_not_goes(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)
    for text in ("old 1", "mine 1", "mine 2"):
        store.put(MODEL.key(text), make(text))
    with store.holding([MODEL.key(text) for text in ("mine 1", "mine 2", "mine 3")]):
        for number in range(3, 9):
            store.put(MODEL.key(f"mine {number}"), make(f"mine {number}"))
    there = {entry.text for entry in store.entries()}
    assert {"mine 1", "mine 2", "mine 3"} <= there and "old 1" not in there


def test_what_cannot_be_kept_costs_others_nothing(tmp_path: Path) -> None:
    cap = 4 * SIZE + 400
    others, mine = open_disk(tmp_path, OTHER, cap), open_disk(tmp_path, cap=cap)
    key = put(others, "another model's")
    with mine.holding():
        for number in range(3):
            put(mine, f"text {number}")
        assert mine.put(MODEL.key("large"), make("large", tokens=40)) is False
        assert others.get(key) is not None and total(tmp_path) <= cap
        assert all(mine.get(MODEL.key(f"text {number}")) is not None for number in range(3))
    mine.refresh()
    assert mine.vanished() == []


def test_all_stores_of_a_place_are_held_together(tmp_path: Path) -> None:
    place = Place(tmp_path, 1, 4 * SIZE + 400)
    first, second = place.store(MODEL), place.store(OTHER)
    with first.holding(), second.holding():
        for number in range(5):
            first.put(MODEL.key(f"text {number}"), make(f"text {number}"))
            second.put(OTHER.key(f"text {number}"), make(f"text {number}"))
        assert first.fitting(["text 9"]) == second.fitting(["text 9"]) == 0
    assert [first.get(MODEL.key(f"text {number}")) is not None for number in range(3)] == [True, True, False]


@pytest.mark.parametrize("kind", ["memory", "disk", "tiers", "int8"])
def test_it_is_told_how_many_will_fit(tmp_path: Path, kind: str) -> None:
    store = small(kind, tmp_path)
    texts = [f"text {number}" for number in range(9)]
    assert store.fitting(texts) == 9, "nothing is held"
    with store.holding():
        assert store.fitting(texts) == 9, "nothing is known"
        store.put(MODEL.key(texts[0]), make(texts[0]))
        told = 1 + store.fitting(texts[1:])
        for text in texts[1:]:
            store.put(MODEL.key(text), make(text))
    lasting = store.tiers[-1] if isinstance(store, TieredStore) else store
    assert told == sum(MODEL.key(text) in lasting for text in texts) < 9
    assert store.fitting(texts) == 9


def test_what_leaves_the_store_meanwhile_makes_room(tmp_path: Path) -> None:
    store, other = open_disk(tmp_path, cap=4 * SIZE + 400), open_disk(tmp_path)
    with store.holding():
        keys = [put(store, f"text {number}") for number in range(4)]
        assert store.put(MODEL.key("text 4"), make("text 4")) is False
        store.delete(keys[:1])
        put(store, "text 4")
        other.refresh(), other.delete(keys[1:2])
        assert store.get(keys[1]) is None
        put(store, "text 5")
        path_of(store, keys[2]).unlink()
        assert store.refresh()
        put(store, "text 6")


def test_with_a_remote_behind_memory_nothing_is_refused() -> None:
    pytest.importorskip("fsspec")
    store = Place(None, 2 * NBYTES, HUGE, remote=Remote("memory://budget", timeout=60)).store(MODEL)
    with store.holding():
        assert store.fitting(["text"] * 9) == 9
        for number in range(9):
            store.put(MODEL.key(f"text {number}"), make(f"text {number}"))
    assert store.stats().failed_puts == 0


# ---- one budget ----------------------------------------------------------------------------------------------------


def test_whatever_is_kept_in_memory_shares_its_cap() -> None:
    memory = MemoryBudget(4 * NBYTES)
    store, preambles = MemoryStore(memory), LRUCache[str, str](memory, "preambles")
    assert preambles.put("p", "KV", 2 * NBYTES)
    for number in range(2):
        assert store.put(MODEL.key(f"text {number}"), make(f"text {number}"))
    assert memory.by_kind() == {"chunks": 2 * NBYTES, "preambles": 2 * NBYTES} and memory.nbytes == memory.cap
    assert preambles.get("p") == "KV" and same(store.get(MODEL.key("text 1")), make("text 1"))
    store.put(MODEL.key("text 2"), make("text 2"))  # what was used longest ago goes, whoever's it is
    assert MODEL.key("text 0") not in store and "p" in preambles
    store.put(MODEL.key("text 3"), make("text 3"))
    assert "p" not in preambles and preambles.get("p") is None and memory.by_kind() == {"chunks": 3 * NBYTES}
    assert preambles.put("q", "KV", 3 * NBYTES) and store.stats().entries == 1 and store.stats().evicted == 3


def test_a_cache_that_is_gone_takes_no_room() -> None:
    memory = MemoryBudget(100)
    cache = LRUCache[int, Any](memory, "one")
    cache.put(0, cache, 90)  # even in a circle
    del cache
    gc.collect()
    assert memory.nbytes == 0 and memory.by_kind() == {}


def test_an_ingestion_into_memory_leaves_other_holders_what_they_have_only_as_far_as_it_must() -> None:
    memory = MemoryBudget(4 * NBYTES)
    store, others = MemoryStore(memory), LRUCache[str, str](memory, "preambles")
    others.put("p", "KV", NBYTES)
    with store.holding():
        for number in range(6):
            store.put(MODEL.key(f"text {number}"), make(f"text {number}"))
        assert others.put("q", "KV", NBYTES) is False, "what is held stays"
    assert store.stats().entries == 4 and memory.by_kind() == {"chunks": 4 * NBYTES}


def test_many_threads_keep_the_budget() -> None:
    memory, over = MemoryBudget(20 * NBYTES), list[int]()
    stores = [MemoryStore(memory) for _ in range(3)]
    cache = LRUCache[int, int](memory, "others")

    def work(number: int) -> None:
        namespace = Namespace({**MODEL.fields, "model": str(number)})
        for step in range(200):
            text = f"text {step % 17}"
            stores[number % 3].put(namespace.key(text), replace(make("x"), text=text))
            stores[number % 3].get(namespace.key(text))
            cache.put(step % 7, step, NBYTES)
            over.append(memory.nbytes)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(over) <= memory.cap and memory.nbytes == sum(memory.by_kind().values())
    assert memory.by_kind()["chunks"] == sum(store.stats().nbytes for store in stores)
    assert sum(store.stats().entries for store in stores) * NBYTES == memory.by_kind()["chunks"]


def test_ingestions_that_overlap_hold_until_the_last_has_ended() -> None:
    memory = MemoryBudget(100)
    cache = LRUCache[int, int](memory, "one")
    first, second = cache.holding([]), cache.holding([])
    first.__enter__()
    second.__enter__()
    cache.put(1, 1, 60)
    first.__exit__(None, None, None)
    assert cache.put(2, 2, 60) is False and 1 in cache
    second.__exit__(None, None, None)
    assert cache.put(2, 2, 60) and 1 not in cache and cache.held_bytes == 0
    assert cache.put(3, 3, 60) and 2 not in cache, "nothing is held for ever"
