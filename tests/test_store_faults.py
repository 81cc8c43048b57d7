"""Full, failing, busy and read-only disks cost time or a chunk that is not kept, never an error or an answer."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stores import HUGE, MODEL, fill, make, open_disk, path_of, put, same

from cacheclip_rag.errors import StoreError
from cacheclip_rag.store import DiskStore, cap, files


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_an_error_anywhere_in_a_put_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store = DiskStore(tmp_path, MODEL, HUGE, sync=True)

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    chunk = make("unlucky")
    key = MODEL.key(chunk.text)
    monkeypatch.setattr(files.os, call, fail)
    assert store.put(key, chunk) is False
    monkeypatch.undo()
    assert [file.name for file in store.path.iterdir()] == ["namespace.json"]
    assert store.stats().failed_puts == 1 and store.get(key) is None
    assert store.put(key, chunk) and store.get(key) is not None


class FullDisk:
    """A disk on which `files.fill` fails with ``number`` until so many files were removed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, removals: float) -> None:
        self.tries = self.removed = 0
        fill, remove = files.fill, files.remove

        def full(*arguments: Any) -> None:
            self.tries += 1
            if self.removed < removals:
                raise OSError(number, os.strerror(number))
            fill(*arguments)

        def counted(path: Path) -> None:
            self.removed += 1
            remove(path)

        monkeypatch.setattr(files, "fill", full)
        monkeypatch.setattr(files, "remove", counted)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_evicts_the_oldest_once_and_tries_again(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, clock: Callable[[float], None], number: int
) -> None:
    keys = []
    for chunk in (make(f"chunk number {i}", seed=i) for i in range(4)):
        store.put(MODEL.key(chunk.text), chunk)
        keys.append(MODEL.key(chunk.text))
        clock(1)
    full = FullDisk(monkeypatch, number, removals=1)
    new = make("chunk number 9")
    assert store.put(MODEL.key(new.text), new) is True
    assert full.tries == 2 and store.stats().evicted == full.removed == 1
    assert keys[0] not in store and all(key in store for key in keys[1:])
    assert same(store.get(MODEL.key(new.text)), new)


def test_a_disk_that_stays_full_costs_one_eviction_a_put(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store, 4)
    full = FullDisk(monkeypatch, errno.ENOSPC, removals=float("inf"))
    new = make("chunk number 9")
    assert store.put(MODEL.key(new.text), new) is False
    assert full.tries == 2 and full.removed == 1 and store.stats().entries == 3
    assert store.stats().failed_puts == 1


def test_a_full_disk_and_an_empty_store(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    full = FullDisk(monkeypatch, errno.ENOSPC, removals=float("inf"))
    assert store.put(MODEL.key("x"), make("x")) is False
    assert full.tries == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.parametrize("described", [True, False])
def test_a_folder_that_cannot_be_written_serves_what_it_holds(
    store: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, described: bool
) -> None:
    ((key, chunk),) = fill(store, 1)
    if not described:
        (store.path / "namespace.json").unlink()

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for function in ("publish", "reserve", "make_directory", "remove", "rename", "touch"):
        monkeypatch.setattr(files, function, fail)
    reopened = open_disk(tmp_path)
    assert not reopened.writable
    assert same(reopened.get(key), chunk)
    assert reopened.put(MODEL.key("new"), make("new")) is False
    assert reopened.put(key, chunk) is True  # it is there
    reopened.delete([key])
    assert path_of(store, key).exists()
    path_of(store, key).write_bytes(b"damaged, and cannot be set aside")
    assert reopened.get(key) is None


def test_a_missing_folder_that_cannot_be_made_is_an_empty_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(files, "make_directory", fail)
    store = open_disk(tmp_path / "missing")
    assert not store.writable and store.get(MODEL.key("x")) is None and list(store.entries()) == []
    assert store.put(MODEL.key("x"), make("x")) is False and store.refresh() is False


def test_a_folder_that_may_not_be_looked_into_is_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What an ordinary user meets below another user's private folder: not even stat is allowed.
    def forbid(path: Path, *_: object) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for function in (
        "make_directory",
        "status",
        "changed",
        "listing",
        "read",
        "read_head",
        "publish",
        "reserve",
        "overwrite",
    ):
        monkeypatch.setattr(files, function, forbid)
    try:
        assert not open_disk(tmp_path / "locked").writable
    except StoreError:
        pass


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    store = open_disk(tmp_path / "a" / "b" / "c")
    assert store.writable and len(fill(store, 1)) == 1


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="cannot be used"):
            open_disk(folder)
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_busy_store_is_not_waited_for_longer_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path)
    kept = put(store, "text 0")
    monkeypatch.setattr(cap, "PATIENCE", 0.2)
    with files.lock(tmp_path / ".lock", 5.0):
        start = time.monotonic()
        assert store.put(MODEL.key("text 1"), make("text 1")) is False
        assert time.monotonic() - start < 5
        assert same(store.get(kept), make("text 0")), "readers need no lock"
        assert same(open_disk(tmp_path).get(kept), make("text 0"))
    assert store.put(MODEL.key("text 1"), make("text 1"))
