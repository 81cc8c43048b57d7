"""What `docs/store.md` promises beyond `test_store.py`: one cap for all, privacy, secrets, forgetting, old formats."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.errors import StoreError
from cacheclip_rag.store import DiskStore, MemoryStore, TieredStore, cap, disk, files, format
from cacheclip_rag.store.admin import Administration
from cacheclip_rag.store.holdings import occurs_in

HUGE = 1 << 40
ONE, TWO = (Namespace({"format": format.FORMAT, "model": name, "tenant": ""}) for name in ("one", "two"))


def make(text: str, tokens: int = 8, seed: int = 0) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn((2, 2, 2, tokens, 4), generator=generator)
    return ChunkKV(text, torch.arange(tokens), torch.arange(2 * tokens).view(tokens, 2), kv[0], kv[1], 0)


def same(a: ChunkKV | None, b: ChunkKV) -> bool:
    return a is not None and a.text == b.text and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def open_disk(folder: Path, namespace: Namespace = ONE, cap: int = HUGE) -> DiskStore:
    return DiskStore(folder, namespace, cap, sync=False)


def put(store: DiskStore, text: str, **options: Any) -> str:
    key = store.namespace.key(text)
    assert store.put(key, make(text, **options))
    return key


def path_of(store: DiskStore, key: str) -> Path:
    return store.path / f"{key}.safetensors"


def total(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.suffix in (".safetensors", ".bad") or ".tmp-" in p.name)


SIZE = len(format.dump(ONE.key("text 0"), make("text 0"), ONE))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, time.time() - seconds), follow_symlinks=False)


# ---- P7: one cap -------------------------------------------------------------------------------------------------


def test_the_cap_counts_all_models_in_the_folder(tmp_path: Path) -> None:
    limit = 6 * SIZE + 600
    stores = [open_disk(tmp_path, namespace, limit) for namespace in (ONE, TWO)]
    for number in range(20):
        put(stores[number % 2], f"text {number}", seed=number)
        assert total(tmp_path) <= limit
    assert all(store.refresh() or store.stats().entries for store in stores)


def test_what_no_model_uses_any_more_goes_first(tmp_path: Path) -> None:
    old, new = open_disk(tmp_path, TWO, 5 * SIZE + 500), open_disk(tmp_path, ONE, 5 * SIZE + 500)
    for number in range(3):
        age(path_of(old, put(old, f"text {number}")), 3000 - number)
    keys = [put(new, f"text {number}") for number in range(4)]
    assert all(key in new for key in keys) and old.refresh() and old.stats().entries < 3


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


def test_what_is_being_read_is_not_evicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    store._index[keys[0]].used = 0.0
    age(path_of(store, keys[0]), 5000)
    put(store, "text 5"), put(store, "text 6")
    assert path_of(store, keys[0]).exists() and not path_of(store, keys[1]).exists()
    go_on.set()
    thread.join()
    assert same(got[0], make("text 0"))
    assert not store._reading


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


def test_what_memory_serves_is_not_the_disk_s_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = open_disk(tmp_path, cap=4 * SIZE + 400)
    tiers = TieredStore(MemoryStore(HUGE), far)
    keys = [ONE.key(f"text {number}") for number in range(4)]
    for number, key in enumerate(keys):
        tiers.put(key, make(f"text {number}"))
        age(path_of(far, key), 4000 - number)
        far._index[key].used = far._index[key].stamped = time.time() - 4000 + number
    assert tiers.get(keys[0]) is not None  # from memory
    tiers.put(ONE.key("new"), make("new"))
    assert keys[0] in far and keys[1] not in far


def test_a_busy_store_is_not_waited_for_longer_than_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path)
    kept = put(store, "text 0")
    monkeypatch.setattr(cap, "_PATIENCE", 0.2)
    with files.lock(tmp_path / ".lock", 5.0):
        start = time.monotonic()
        assert store.put(ONE.key("text 1"), make("text 1")) is False
        assert time.monotonic() - start < 5
        assert same(store.get(kept), make("text 0")), "readers need no lock"
        assert same(open_disk(tmp_path).get(kept), make("text 0"))
    assert store.put(ONE.key("text 1"), make("text 1"))


def test_without_locks_a_store_still_keeps_its_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> Any:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files, "lock", no_locks)
    store = open_disk(tmp_path, cap=3 * SIZE + 300)
    for number in range(8):
        put(store, f"text {number}")
        assert total(tmp_path) <= store.cap


def test_a_store_that_was_cleared_goes_on(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key = put(store, "text 0")
    Administration(tmp_path).clear()
    assert not store.path.exists()
    assert store.refresh() is True and key not in store and list(store.entries()) == []
    assert store.get(put(store, "text 0")) is not None


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
    one, two = open_disk(tmp_path, ONE, limit), open_disk(tmp_path, TWO, limit)
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
    one, two = open_disk(tmp_path, ONE, limit), open_disk(tmp_path, TWO, limit)
    with monkeypatch.context() as patch:
        patch.setattr(files, "overwrite", fail)
        put(one, "text 0"), put(one, "text 1"), put(one, "text 2")
    put(two, "text 0"), put(two, "text 1")
    assert total(tmp_path) <= limit


# ---- P2, P4: never harm a good file ------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [False, True])
def test_a_file_that_was_replaced_meanwhile_is_not_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    if alike:  # the new file has the old one's number, as happens where they are reused
        contents, number = files.contents, os.stat(tmp_path)
        monkeypatch.setattr(files, "contents", lambda path, limit, check: (contents(path, limit)[0], number))
        monkeypatch.setattr(files, "status", lambda path: number)
    store, other = open_disk(tmp_path), open_disk(tmp_path)
    key = put(store, "text 0")
    good = path_of(store, key).read_bytes()
    path_of(store, key).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    load = format.load

    def replaced(data: bytes, *rest: Any) -> ChunkKV:
        other.delete([key])
        files.publish(path_of(other, key), good, False)
        return load(data, *rest)

    monkeypatch.setattr(format, "load", replaced)
    assert store.get(key) is None
    monkeypatch.undo()
    assert path_of(store, key).read_bytes() == good and not list(store.path.glob("*.bad"))
    assert same(open_disk(tmp_path).get(key), make("text 0"))


def test_a_link_or_a_pipe_in_the_place_of_a_file_is_a_miss(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    link, pipe = put(store, "text 0"), put(store, "text 1")
    elsewhere = tmp_path / "elsewhere"
    path_of(store, link).rename(elsewhere)
    path_of(store, link).symlink_to(elsewhere)
    path_of(store, pipe).unlink()
    os.mkfifo(path_of(store, pipe))
    for opened in (store, open_disk(tmp_path)):
        assert opened.get(link) is None and opened.get(pipe) is None
    assert elsewhere.exists()


def whole_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that are read into memory from now on."""
    sizes: list[int] = []
    empty = files.np.empty

    def counted(size: int, *rest: Any) -> Any:
        sizes.append(size - 1)
        return empty(size, *rest)

    monkeypatch.setattr(files.np, "empty", counted)
    return sizes


HOLES = 64 << 20  # bytes that are there by name only


def sparse(path: Path, data: bytes, tensor: str | None = None) -> None:
    """Make a file of these bytes and a hole behind them, of which the header says that it is ``tensor``'s."""
    length = int.from_bytes(data[:8], "little")
    if tensor is not None:
        header = json.loads(data[8 : 8 + length])
        end = len(data) - 8 - length
        header[tensor] = {"dtype": "U8", "shape": [HOLES], "data_offsets": [end, end + HOLES]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        data = len(raw).to_bytes(8, "little") + raw + data[8 + length :]
    path.write_bytes(data)
    os.truncate(path, len(data) + HOLES)


@pytest.mark.parametrize("secret", [b"", b"correct horse"])
@pytest.mark.parametrize("tensor", [None, "extra.more"])
def test_a_file_with_holes_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str | None, secret: bytes
) -> None:
    namespace = replace(ONE, secret=secret)
    store = open_disk(tmp_path, namespace)
    key = put(store, "text 0")
    sparse(path_of(store, key), path_of(store, key).read_bytes(), tensor)
    sizes = whole_reads(monkeypatch)
    found = Administration(tmp_path).verify(secret)
    assert [reason for _, reason in found.bad] == ["checksum" if tensor else "larger than its header says"]
    assert store.get(key) is None and key not in open_disk(tmp_path, namespace)
    assert max(sizes, default=0) < HOLES
    assert put(store, "text 0") == key and same(store.get(key), make("text 0"))


def test_a_good_file_with_holes_is_served(tmp_path: Path) -> None:
    """Some file systems store no zeros, and some copy files so."""
    store = open_disk(tmp_path)
    chunk = replace(make("text 0"), extra={"zeros": torch.zeros((8, 1 << 20), dtype=torch.uint8)})
    key = ONE.key("text 0")
    assert store.put(key, chunk)
    path = path_of(store, key)
    data = path.read_bytes()
    path.write_bytes(b"")
    with open(path, "r+b") as file:
        for start in range(0, len(data), 4096):
            if any(piece := data[start : start + 4096]):
                file.seek(start)
                file.write(piece)
        file.truncate(len(data))
    assert path.read_bytes() == data
    got = open_disk(tmp_path).get(key)
    assert same(got, chunk) and got is not None and not got.extra["zeros"].any()
    assert Administration(tmp_path).verify().good == 1


def test_a_file_larger_than_the_whole_store_may_be_is_not_read(tmp_path: Path) -> None:
    store = open_disk(tmp_path, cap=1 << 20)
    key = put(store, "text 0")
    with open(path_of(store, key), "r+b") as file:
        file.truncate(1 << 40)
    assert store.get(key) is None and store.stats().rejected == {"unreadable": 1}


def test_tensors_that_share_memory_are_stored_each(tmp_path: Path) -> None:
    chunk = make("shared")
    chunk = replace(chunk, values=chunk.keys, extra={"first": chunk.ids[:8], "pairs": chunk.offsets[:, 0]})
    store = open_disk(tmp_path)
    assert store.put(ONE.key("shared"), chunk)
    got = store.get(ONE.key("shared"))
    assert same(got, chunk) and got is not None and torch.equal(got.extra["pairs"], chunk.offsets[:, 0])


def test_a_chunk_that_memory_cannot_hold_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(format, "dump", fail)
    store = open_disk(tmp_path)
    assert store.put(ONE.key("text 0"), make("text 0")) is False and store.stats().failed_puts == 1


# ---- P11: nothing that data could do -----------------------------------------------------------------------------


def test_a_file_with_a_great_many_tensors_is_not_loaded() -> None:
    chunk = replace(make("many"), extra={f"n{i}": torch.zeros(8) for i in range(format.MAX_TENSORS)})
    with pytest.raises(format.Rejected, match="too many tensors"):
        format.load(format.dump(ONE.key("many"), chunk, ONE), ONE.key("many"), ONE)


def test_nothing_is_ever_unpickled() -> None:
    package = Path(format.__file__).parent
    for source in package.glob("*.py"):
        text = source.read_text()
        assert not re.search(r"pickle|(?<!safetensors\.)torch\.load|\beval\(|\bexec\(|sqlite", text), source.name


def test_only_one_module_touches_the_file_system() -> None:
    package = Path(format.__file__).parent
    access = re.compile(
        r"\bopen\(|\bos\.(?!stat_result)|\bshutil\b|\.(write|read)_(bytes|text)\(|\.(unlink|mkdir|stat|exists)\(\)"
    )
    for source in package.glob("*.py"):
        if source.name == "files.py":
            continue
        assert not [line for line in source.read_text().splitlines() if access.search(line)], source.name


# ---- P10: private ------------------------------------------------------------------------------------------------


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


KEYED, OTHER_SECRET = replace(ONE, secret=b"correct horse"), replace(ONE, secret=b"battery staple")


def test_keyed_chunks_are_found_with_their_secret_only(tmp_path: Path) -> None:
    store = open_disk(tmp_path, KEYED)
    key = put(store, "text 0")
    assert same(open_disk(tmp_path, KEYED).get(key), make("text 0"))
    for namespace in (ONE, OTHER_SECRET):
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


def test_tenants_share_a_folder_and_nothing_else(tmp_path: Path) -> None:
    mine, yours = (Namespace({**ONE.fields, "tenant": tenant}) for tenant in ("a", "b"))
    key = put(open_disk(tmp_path, mine), "text 0")
    assert same(open_disk(tmp_path, mine).get(key), make("text 0"))
    theirs = open_disk(tmp_path, yours)
    assert theirs.get(key) is None and theirs.get(yours.key("text 0")) is None
    other = open_disk(tmp_path, yours)
    (other.path / f"{key}.safetensors").write_bytes(path_of(open_disk(tmp_path, mine), key).read_bytes())
    assert open_disk(tmp_path, yours).get(key) is None, "copied into the other tenant's folder"


@pytest.mark.parametrize("name", [".usage", ".lock"])
@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_a_link_under_the_name_of_a_note_leads_nowhere(tmp_path: Path, name: str, link: str) -> None:
    folder, victim = tmp_path / "store", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious " * 20)
    victim.chmod(0o644)
    (folder / name).hardlink_to(victim) if link == "hard" else (folder / name).symlink_to(victim)
    store = open_disk(folder)
    key = put(store, "text 0")
    assert same(store.get(key), make("text 0"))
    assert victim.read_text() == "precious " * 20 and stat.S_IMODE(victim.stat().st_mode) == 0o644


# ---- P13: forgetting ---------------------------------------------------------------------------------------------


def holds(folder: Path, text: str) -> bool:
    return any(text.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_nothing_is_left_of_a_deleted_chunk(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key, other = put(store, "a secret text"), put(store, "another text")
    path_of(store, key).write_bytes(path_of(store, key).read_bytes()[:-1])
    assert store.get(key) is None and holds(tmp_path, "a secret text"), "set aside"
    put(store, "a secret text")
    store.delete([key])
    assert not holds(tmp_path, "a secret text") and other in store


def test_forgetting_a_document_leaves_nothing_of_it(tmp_path: Path) -> None:
    stores = [open_disk(tmp_path, namespace) for namespace in (ONE, TWO, KEYED)]
    for store in stores:
        put(store, "the first half of the report"), put(store, "its other\n half"), put(store, "something else")
    bad = put(stores[0], "a half that is damaged")
    path_of(stores[0], bad).write_bytes(b"\x05garbage with a half that is damaged")
    stores[0].get(bad)
    data = path_of(stores[0], ONE.key("its other\n half")).read_bytes()
    (stores[0].path / ".tmp-1-killed").write_bytes(data)
    (stores[0].path / ".tmp-2-killed-earlier").write_bytes(data[:20])
    document = "It is the first  half of the\nreport, and its other half. a half that is damaged"
    gone = Administration(tmp_path).forget(occurs_in([document]))
    assert len(gone) == 6
    for text in ("the first half of the report", "its other", "a half that is damaged"):
        assert not holds(tmp_path, text)
    for store in stores:
        store.refresh()
        assert [entry.text for entry in store.entries()] == ["something else"]


def test_a_frameworks_metadata_need_not_stand_in_the_document() -> None:
    found = occurs_in(["First line.\n\nThe half that is left out here."])
    assert found("file_name: report.txt\npage: 3\n\nThe half that is left\nout here.")
    assert found("First line.\n\nThe half")
    assert not found("file_name: report.txt\n\nThe other half.")
    assert not found("A heading\n\nThe half that is left out here.")  # another document may say so
    assert not found("file_name: report.txt\n\n") and not found(" \n")


def test_what_another_process_removed_is_not_served_from_memory(tmp_path: Path) -> None:
    tiers = TieredStore(MemoryStore(HUGE), open_disk(tmp_path))
    key = ONE.key("a secret text")
    tiers.put(key, make("a secret text"))
    Administration(tmp_path).forget(lambda text: "secret" in text)
    assert tiers.refresh() is True
    assert tiers.get(key) is None and key not in tiers


def test_any_number_of_chunks_that_others_removed_are_dropped_from_memory(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    put(store, "text 0")
    known = store._index[ONE.key("text 0")]
    store._index |= {f"{number:064x}": known for number in range(70_000)}
    later = store.path.stat().st_mtime_ns + 1_000_000
    os.utime(store.path, ns=(later, later))
    assert store.refresh() and len(store.vanished()) == 70_000 and store.vanished() == []


def test_what_this_process_removes_while_it_looks_was_not_removed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, other = open_disk(tmp_path), open_disk(tmp_path)
    mine, theirs = put(store, "text 0"), put(store, "text 1")
    assert other.refresh() and other.changes == 1 and store.changes == 0
    listed = store._listed

    def meanwhile() -> set[str]:
        store.delete([mine])
        return listed()

    monkeypatch.setattr(store, "_listed", meanwhile)
    other.delete([theirs])
    assert store.refresh() and store.changes == 1 and store.vanished() == [theirs]


def test_a_chunk_s_file_that_cannot_be_read_is_forgotten_too(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    keys = [put(store, f"a secret text {number}") for number in range(3)]
    kept = put(store, "something else")
    path_of(store, keys[0]).write_bytes(path_of(store, keys[0]).read_bytes()[:400])  # nobody has noticed yet
    path_of(store, keys[1]).write_bytes(path_of(store, keys[1]).read_bytes().replace(b'"position"', b'"positiom"'))
    assert len(Administration(tmp_path).forget(lambda text: "secret" in text)) == 1
    assert not holds(tmp_path, "secret") and path_of(store, kept).exists()


def test_what_cannot_be_looked_into_is_not_said_to_be_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(open_disk(tmp_path), "a secret text")

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "read_head", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        Administration(tmp_path).forget(lambda text: "secret" in text)
    assert Administration(tmp_path).usage()[0].unreadable == 1


# ---- P14: formats to come, and those that were -------------------------------------------------------------------


def test_a_file_of_version_1_is_served_as_it_was_written(tmp_path: Path) -> None:
    golden = Path(__file__).parent / "data" / "cacheclip-rag-1.safetensors"
    text = "A chunk that version 1 of the format wrote. It must be served as long as that version is read."
    namespace = Namespace({"format": "cacheclip-rag/1", "model": "golden", "tenant": ""})
    store = open_disk(tmp_path, namespace)
    path_of(store, namespace.key(text)).write_bytes(golden.read_bytes())
    got = open_disk(tmp_path, namespace).get(namespace.key(text))
    kv = (torch.arange(192) / 16).reshape(2, 2, 2, 6, 4).bfloat16()
    assert got is not None and got.text == text and got.position == 16
    assert torch.equal(got.keys, kv[0]) and torch.equal(got.values, kv[1])
    assert got.ids.tolist() == [0, 7, 14, 21, 28, 35] and got.extra["note"].tolist() == [0, 1, 2, 3, 4, 5]


def test_files_of_a_format_to_come_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(format, "FORMAT", "cacheclip-rag/2")
        newer = Namespace({**ONE.fields, "format": "cacheclip-rag/2"})
        key = put(open_disk(tmp_path, newer), "text 0")
    store = open_disk(tmp_path)
    assert store.get(key) is None and store.get(ONE.key("text 0")) is None and list(store.entries()) == []
    usage = {one.name: one for one in Administration(tmp_path).usage()}[newer.digest[:32]]
    assert (usage.entries, usage.unreadable) == (1, 1)
    assert (tmp_path / newer.digest[:32] / f"{key}.safetensors").exists()


# ---- P5, P6 ------------------------------------------------------------------------------------------------------


def test_what_crashes_left_is_swept_for_all_models(tmp_path: Path) -> None:
    other = open_disk(tmp_path, TWO)
    old, young = other.path / ".tmp-1-old", other.path / ".tmp-2-young"
    old.write_bytes(b"x"), young.write_bytes(b"x")
    age(old, 7200)
    open_disk(tmp_path, ONE)
    assert not old.exists() and young.exists()


def test_losing_everything_but_the_chunks_loses_nothing(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key = put(store, "text 0")
    for path in (tmp_path / ".usage", tmp_path / ".lock", store.path / "namespace.json"):
        path.unlink()
    again = open_disk(tmp_path)
    assert same(again.get(key), make("text 0"))
    assert (store.path / "namespace.json").exists() and again.put(ONE.key("text 1"), make("text 1"))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        store = open_disk(tmp_path, cap=3 * SIZE + 300)
        key = put(store, f"text {number}")
        store.get(key)
        path_of(store, key).write_bytes(b"damaged")
        store.get(key)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert disk._is_key(key)


def test_no_memory_is_left_behind(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    store = open_disk(tmp_path)
    chunk = make("large", tokens=8192)

    def rounds(count: int) -> None:
        for _ in range(count):
            key = ONE.key("large")
            assert store.put(key, chunk) and same(store.get(key), chunk)
            with open(path_of(store, key), "r+b") as file:
                file.truncate(1 << 20)
            assert store.get(key) is None
            store.delete([key])

    rounds(5)
    before = resident()
    rounds(60)
    assert resident() - before < 10 * chunk.nbytes
    assert not store._reading and not store._vanished and not store._index
    assert [path.name for path in store.path.iterdir()] == ["namespace.json"]


# ---- context -----------------------------------------------------------------------------------------------------


def test_the_company_a_chunk_was_computed_in_is_part_of_what_it_is(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    alone, fused = make("text"), replace(make("text", seed=1), context=("one", "two"))
    keys = [ONE.key("text", context) for context in ((), ("one", "two"), ("two", "one"), ("onetwo",))]
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
def test_a_company_that_is_no_list_of_texts_is_damage(context: str) -> None:
    with pytest.raises(format.Rejected, match="damaged header"):
        format.context({"company": context})


def test_forgetting_a_text_forgets_what_was_computed_with_it(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    for text, context in (("a", ()), ("b", ("a secret", "c")), ("c", ("b",)), ("a secret", ())):
        assert store.put(ONE.key(text, context), replace(make(text), context=context))
    gone = Administration(tmp_path).forget(lambda text: "secret" in text)
    assert {stored.text for stored in gone} == {"a secret", "b"}
    assert {stored.text for stored in Administration(tmp_path).entries()} == {"a", "c"}
    assert not any(b"a secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
