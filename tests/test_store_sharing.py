"""Processes that share a folder see each other's chunks; tenants and secrets that share it see nothing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from stores import (
    KEYED,
    MODEL,
    OTHER,
    OTHER_SECRET,
    SIZE,
    fill,
    later,
    make,
    open_disk,
    path_of,
    put,
    same,
)

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.store import files, format
from cacheclip_rag.store.admin import Administration


def test_two_stores_over_one_folder_see_each_other_s_chunks(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    assert two.refresh() is False
    chunks = fill(one, 3)
    later(one.path)
    assert two.refresh() is True
    for key, chunk in chunks:
        assert same(two.get(key), chunk)
    two.delete([chunks[0][0]])
    later(one.path)
    assert {entry.key for entry in one.entries()} == {key for key, _ in chunks[1:]}
    assert one.get(chunks[0][0]) is None


def test_a_change_in_the_same_tick_of_the_clock_is_noticed(tmp_path: Path) -> None:
    # A folder's time of change advances in ticks (4 ms on Linux, 1 or 2 s on some disks): two changes may share one.
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    first, second = make("first"), make("second", seed=1)
    assert one.put(MODEL.key("first"), first)
    two.refresh()
    tick = two.path.stat().st_mtime_ns
    assert one.put(MODEL.key("second"), second)
    os.utime(two.path, ns=(tick, tick))
    two.refresh()
    assert same(two.get(MODEL.key("second")), second)


def test_a_chunk_that_another_process_evicted_is_a_miss(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    ((key, chunk),) = fill(one, 1)
    later(one.path)
    two.refresh()
    one.delete([key])
    assert two.get(key) is None and key not in two
    assert two.put(key, chunk) and two.get(key) is not None


def test_a_store_that_was_cleared_goes_on(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key = put(store, "text 0")
    Administration(tmp_path).clear()
    assert not store.path.exists()
    assert store.refresh() is True and key not in store and list(store.entries()) == []
    assert store.get(put(store, "text 0")) is not None


def test_what_this_process_removes_while_it_looks_was_not_removed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_disk(tmp_path), open_disk(tmp_path)
    mine, theirs = put(store, "text 0"), put(store, "text 1")
    assert other.refresh() and other.changes == 1 and store.changes == 0
    listing = files.listing

    def meanwhile(path: Path) -> Any:
        store.delete([mine])
        return listing(path)

    other.delete([theirs])
    monkeypatch.setattr(files, "listing", meanwhile)
    assert store.refresh() and store.changes == 1 and store.vanished() == [theirs]


@pytest.mark.parametrize("other", [Namespace({**MODEL.fields, "tenant": "b"}), OTHER], ids=["tenant", "model"])
def test_tenants_share_a_folder_and_nothing_else(tmp_path: Path, other: Namespace) -> None:
    mine = open_disk(tmp_path)
    key = put(mine, "text 0")
    assert same(open_disk(tmp_path).get(key), make("text 0"))
    theirs = open_disk(tmp_path, other)
    assert mine.path != theirs.path and key != other.key("text 0")
    for wanted in (key, other.key("text 0")):
        assert theirs.get(wanted) is None and wanted not in theirs
    assert list(theirs.entries()) == []
    path_of(theirs, key).write_bytes(path_of(mine, key).read_bytes())
    assert open_disk(tmp_path, other).get(key) is None, "copied into the other tenant's folder"


def test_everything_that_is_made_is_its_owner_s_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        store = open_disk(tmp_path / "far above" / "above" / "store", cap=3 * SIZE + 300)
        for number in range(5):
            put(store, f"text {number}")
    finally:
        os.umask(before)
    for path in (store.folder.parent.parent, store.folder.parent, store.folder, *store.folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert Administration(store.folder).verify().open_to_others == []
    path_of(store, put(store, "text 9")).chmod(0o644)
    assert len(Administration(store.folder).verify().open_to_others) == 1


def test_keyed_chunks_are_found_with_their_secret_only(tmp_path: Path) -> None:
    store = open_disk(tmp_path, KEYED)
    key = put(store, "text 0")
    assert same(open_disk(tmp_path, KEYED).get(key), make("text 0"))
    for namespace in (MODEL, OTHER_SECRET):
        other = open_disk(tmp_path, namespace)
        assert other.path != store.path and namespace.key("text 0") != key
        assert other.get(namespace.key("text 0")) is None and list(other.entries()) == []
    assert b"correct horse" not in b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert "correct horse" not in repr(KEYED)


def test_a_chunk_forged_without_the_secret_is_not_served(tmp_path: Path) -> None:
    # The forger knows the text, the name and the namespace from a file that was there, and the format.
    store = open_disk(tmp_path, KEYED)
    key = put(store, "text 0")
    forger = Namespace({**KEYED.fields, "keyed": json.loads(KEYED.json)["keyed"]})
    assert forger.json == KEYED.json
    path_of(store, key).write_bytes(format.dump(key, make("text 0", seed=666), forger))
    assert open_disk(tmp_path, KEYED).get(key) is None
    good = put(store, "text 1")
    path_of(store, key).write_bytes(path_of(store, good).read_bytes())  # a good file under another name
    assert store.get(key) is None and open_disk(tmp_path, KEYED).get(key) is None
