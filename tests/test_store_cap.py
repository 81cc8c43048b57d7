"""A store's folder keeps its cap, over all models and processes; what was used longest ago goes first."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stores import HUGE, MODEL, OTHER, SIZE, age, bytes_on_disk, fill, make, open_disk, path_of, put, same, total

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import DiskStore, MemoryStore, TieredStore, cap, files, format


def test_a_store_stays_within_its_cap(tmp_path: Path) -> None:
    size = len(format.dump(MODEL.key("chunk number 0"), make("chunk number 0"), MODEL))
    store = open_disk(tmp_path, cap=10 * size)
    for number in range(30):
        chunk = make(f"chunk number {number % 10}{number}", seed=number)
        assert store.put(MODEL.key(chunk.text), chunk)
        assert bytes_on_disk(store) <= store.cap
        assert store.stats().nbytes == bytes_on_disk(store)
        assert MODEL.key(chunk.text) in store, "what was just put is not evicted"
    assert store.stats().entries >= 8 and store.stats().evicted == 30 - store.stats().entries


def test_parallel_puts_stay_within_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(format.dump(MODEL.key("chunk 0"), make("chunk 0"), MODEL))
    store = open_disk(tmp_path, cap=4 * size + 100)
    together, fill = threading.Barrier(8), files.fill

    def meet(*arguments: Any) -> None:
        try:
            together.wait(1.0)
        except threading.BrokenBarrierError:
            pass
        fill(*arguments)

    monkeypatch.setattr(files, "fill", meet)
    chunks = [make(f"chunk {i}", seed=i) for i in range(8)]
    threads = [threading.Thread(target=store.put, args=(MODEL.key(c.text), c)) for c in chunks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes_on_disk(store) <= store.cap


@pytest.mark.parametrize("other", [OTHER, MODEL], ids=["another model", "another process"])
def test_the_cap_counts_all_models_and_processes_of_the_folder(tmp_path: Path, other: Namespace) -> None:
    limit = 6 * SIZE + 600
    stores = [open_disk(tmp_path, namespace, limit) for namespace in (MODEL, other)]
    for number in range(20):
        put(stores[number % 2], f"text {number}", seed=number)
        assert total(tmp_path) <= limit
    assert all(store.refresh() or store.stats().entries for store in stores)


def test_what_no_model_uses_any_more_goes_first(tmp_path: Path) -> None:
    old, new = open_disk(tmp_path, OTHER, 5 * SIZE + 500), open_disk(tmp_path, MODEL, 5 * SIZE + 500)
    for number in range(3):
        age(path_of(old, put(old, f"text {number}")), 3000 - number)
    keys = [put(new, f"text {number}") for number in range(4)]
    assert all(key in new for key in keys) and old.refresh() and old.stats().entries < 3


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, clock: Callable[[float], None]) -> None:
    size = len(format.dump(MODEL.key("chunk number 0"), make("chunk number 0"), MODEL))
    store = open_disk(tmp_path, cap=4 * size + 100)
    keys = []
    for key, chunk in [(MODEL.key(f"chunk number {i}"), make(f"chunk number {i}", seed=i)) for i in range(4)]:
        assert store.put(key, chunk)
        keys.append(key)
        clock(100)
    assert store.get(keys[0]) is not None
    clock(100)
    assert store.put(MODEL.key("chunk number 4"), make("chunk number 4"))
    assert keys[0] in store and keys[1] not in store and keys[3] in store


def test_use_is_remembered_in_the_files(tmp_path: Path, clock: Callable[[float], None]) -> None:
    store = open_disk(tmp_path)
    keys = [key for key, _ in fill(store, 4)]
    for seconds, key in zip((4000, 3000, 2000, 1000), keys, strict=True):
        age(path_of(store, key), seconds)
    reopened = open_disk(tmp_path, cap=bytes_on_disk(store) + 100)
    assert reopened.get(keys[0]) is not None  # stamps its file
    again = open_disk(tmp_path, cap=bytes_on_disk(store) + 100)
    clock(10)
    assert again.put(MODEL.key("one more"), make("one more"))
    assert keys[0] in again and keys[1] not in again and keys[3] in again


def test_a_file_is_stamped_once_a_minute_at_most(
    store: DiskStore, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ((key, _),) = fill(store, 1)
    stamps: list[Path] = []
    monkeypatch.setattr(files, "touch", stamps.append)
    for _ in range(100):
        clock(3)
        assert store.get(key) is not None
    assert 3 <= len(stamps) <= 5


def test_a_chunk_larger_than_the_cap_evicts_nothing(tmp_path: Path) -> None:
    size = len(format.dump(MODEL.key("chunk number 0"), make("chunk number 0"), MODEL))
    store = open_disk(tmp_path, cap=3 * size)
    chunks = fill(store, 2)
    big = make("big", tokens=2000)
    assert store.put(MODEL.key("big"), big) is False
    assert all(key in store for key, _ in chunks)
    assert store.stats().failed_puts == 1 and store.stats().evicted == 0


def test_a_reservation_is_not_a_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path, cap=100 * SIZE)
    scans, scan = [], cap.SharedCap.scan

    def counted(self: cap.SharedCap) -> Any:
        scans.append(1)
        return scan(self)

    monkeypatch.setattr(cap.SharedCap, "scan", counted)
    for number in range(50):
        put(store, f"text {number}")
    assert not scans


@pytest.mark.parametrize("note", [None, b"", b"00000", b"%020d %020d\n" % (1, 2), b"nonsense\xff", b"%020d " % 5])
def test_the_note_of_what_is_used_may_be_lost_or_torn(tmp_path: Path, note: bytes | None) -> None:
    store = open_disk(tmp_path, cap=4 * SIZE + 400)
    for number in range(3):
        put(store, f"text {number}")
    if note is None:
        (tmp_path / ".usage").unlink()
    else:
        (tmp_path / ".usage").write_bytes(note)
    for number in range(3, 9):
        put(store, f"text {number}")
        assert total(tmp_path) <= store.cap


def test_files_that_others_put_there_count_from_the_next_opening_on(tmp_path: Path) -> None:
    there = open_disk(tmp_path / "other")
    keys = [put(there, f"text {number}") for number in range(6)]
    here = open_disk(tmp_path / "here", cap=4 * SIZE + 400)
    for key in keys:
        path_of(there, key).rename(path_of(here, key))
    again = open_disk(tmp_path / "here", cap=4 * SIZE + 400)
    put(again, "one more")
    assert total(tmp_path / "here") <= again.cap


def test_damaged_files_count_and_go_first(tmp_path: Path) -> None:
    store = open_disk(tmp_path, cap=4 * SIZE + 400)
    keys = [put(store, f"text {number}") for number in range(4)]
    path_of(store, keys[3]).write_bytes(bytes(SIZE))
    assert store.get(keys[3]) is None and (store.path / f"{keys[3]}.bad").exists()
    put(store, "text 9")
    assert total(tmp_path) <= store.cap and not list(store.path.glob("*.bad"))
    assert all(key in store for key in keys[1:3])


def test_what_is_being_read_is_not_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None]
) -> None:
    store = open_disk(tmp_path, cap=4 * SIZE + 400)
    keys = [put(store, f"text {number}") for number in range(4)]
    reading, go_on, read = threading.Event(), threading.Event(), files.contents

    def slow(*arguments: Any) -> Any:
        reading.set()
        assert go_on.wait(60)
        return read(*arguments)

    monkeypatch.setattr(files, "contents", slow)
    got: list[ChunkKV | None] = []
    thread = threading.Thread(target=lambda: got.append(store.get(keys[0])))
    thread.start()
    assert reading.wait(60)
    clock(5000)
    for key in keys[1:]:
        store.touch(key)  # all were used since
    put(store, "text 5"), put(store, "text 6")
    assert path_of(store, keys[0]).exists() and not path_of(store, keys[1]).exists()
    go_on.set()
    thread.join()
    assert same(got[0], make("text 0"))
    put(store, "text 7")
    assert not path_of(store, keys[0]).exists(), "now it may go"


def test_a_reader_keeps_what_it_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, other = open_disk(tmp_path), open_disk(tmp_path)
    key = put(store, "text 0")
    fstat = os.fstat

    def evicted_now(descriptor: int) -> Any:
        other.delete([key])
        return fstat(descriptor)

    monkeypatch.setattr(files.os, "fstat", evicted_now)
    assert same(store.get(key), make("text 0"))
    assert not path_of(store, key).exists()


def test_what_memory_serves_is_not_the_disk_s_oldest(tmp_path: Path, clock: Callable[[float], None]) -> None:
    far = open_disk(tmp_path, cap=4 * SIZE + 400)
    tiers = TieredStore(MemoryStore(HUGE), far)
    keys = [MODEL.key(f"text {number}") for number in range(4)]
    for number, key in enumerate(keys):
        tiers.put(key, make(f"text {number}"))
        clock(100)
    assert tiers.get(keys[0]) is not None  # from memory
    tiers.put(MODEL.key("new"), make("new"))
    assert keys[0] in far and keys[1] not in far


def test_without_locks_a_store_still_keeps_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> Any:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files, "lock", no_locks)
    store = open_disk(tmp_path, cap=3 * SIZE + 300)
    for number in range(8):
        put(store, f"text {number}")
        assert total(tmp_path) <= store.cap


def test_files_are_made_and_renamed_while_nobody_else_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, calls = open_disk(tmp_path), list[str]()
    lock, reserve, rename = files.lock, files.reserve, files.rename

    def held(what: str) -> None:
        calls.append(what)
        with pytest.raises(TimeoutError), lock(tmp_path / ".lock", 0.01):
            pass

    monkeypatch.setattr(files, "reserve", lambda *arguments: (held("made"), reserve(*arguments))[1])
    monkeypatch.setattr(files, "rename", lambda *arguments: (held("renamed"), rename(*arguments))[1])
    key = put(store, "text 0")
    path_of(store, key).write_bytes(b"damaged")
    assert store.get(key) is None
    assert calls == ["made", "renamed", "renamed"], "and set aside"


def test_what_is_being_written_counts_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 4 * SIZE + 400
    one, two = open_disk(tmp_path, MODEL, limit), open_disk(tmp_path, OTHER, limit)
    fill, sizes = files.fill, list[int]()

    def slow(temporary: Path, *rest: Any) -> None:
        if temporary.parent == one.path:
            (tmp_path / ".usage").unlink()  # so that the other one counts
            for number in range(5):
                put(two, f"text {number}")
                sizes.append(total(tmp_path))
        fill(temporary, *rest)

    monkeypatch.setattr(files, "fill", slow)
    put(one, "text 0")
    assert len(sizes) == 5 and max(sizes) <= limit and total(tmp_path) <= limit


def test_eviction_does_not_keep_others_waiting_for_more_than_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_disk(tmp_path, cap=40 * SIZE)
    for number in range(39):
        put(store, f"text {number}")
    before, ticks = store.stats(), itertools.count()  # every look at the clock takes a second
    monkeypatch.setattr(cap, "time", SimpleNamespace(time=time.time, monotonic=lambda: next(ticks)))
    put(store, "one more"), put(store, "another one")
    assert 1 <= store.stats().evicted - before.evicted <= 3
    monkeypatch.undo()
    for number in range(100, 103):
        put(store, f"text {number}")
    assert store.stats().evicted - before.evicted >= 4, "down to 90 %"


def test_a_note_that_cannot_be_written_is_not_believed_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    limit = 4 * SIZE + 400
    one, two = open_disk(tmp_path, MODEL, limit), open_disk(tmp_path, OTHER, limit)
    with monkeypatch.context() as patch:
        patch.setattr(files, "overwrite", fail)
        put(one, "text 0"), put(one, "text 1"), put(one, "text 2")
    put(two, "text 0"), put(two, "text 1")
    assert total(tmp_path) <= limit
