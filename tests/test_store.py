"""Chunk KV at rest: what a store promises, in the face of crashes, damage, full disks and context."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.errors import StoreError
from cacheclip_rag.store import ChunkStore, DiskStore, MemoryStore, TieredStore, disk, files, format
from cacheclip_rag.store.memory import Memory

MODEL = Namespace({"model": "m", "dtype": "bfloat16", "tenant": ""})
OTHER = Namespace({"model": "m", "dtype": "bfloat16", "tenant": "b"})
HUGE = 1 << 40


def make(text: str, tokens: int = 5, dtype: torch.dtype = torch.bfloat16, seed: int = 0, position: int = 16) -> ChunkKV:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, tokens, 4)
    return ChunkKV(
        text=text,
        ids=torch.randint(0, 50_000, (tokens,), generator=generator),
        offsets=torch.arange(2 * tokens).reshape(tokens, 2),
        keys=torch.randn(shape, generator=generator).to(dtype),
        values=torch.randn(shape, generator=generator).to(dtype),
        position=position,
    )


def same(a: ChunkKV, b: ChunkKV) -> bool:
    """Bit for bit."""

    def bits(chunk: ChunkKV) -> list[Any]:
        tensors = (chunk.ids, chunk.offsets, chunk.keys, chunk.values)
        return [(t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for t in tensors]

    return (a.text, a.position) == (b.text, b.position) and bits(a) == bits(b)


def open_disk(folder: Path, cap: int = HUGE, namespace: Namespace = MODEL) -> DiskStore:
    return DiskStore(folder, namespace, cap, sync=False)


def fill(store: ChunkStore, count: int, **options: Any) -> list[tuple[str, ChunkKV]]:
    chunks = [make(f"chunk number {i}", seed=i, **options) for i in range(count)]
    for chunk in chunks:
        assert store.put(MODEL.key(chunk.text), chunk)
    return [(MODEL.key(chunk.text), chunk) for chunk in chunks]


def path_of(store: DiskStore, key: str) -> Path:
    return store.path / f"{key}.safetensors"


def later(folder: Path) -> None:
    """Let the folder's time of change be another one, whatever the clock's grain."""
    before = folder.stat().st_mtime_ns
    os.utime(folder, ns=(before, before + 1_000_000))


def bytes_on_disk(store: DiskStore) -> int:
    return sum(file.stat().st_size for file in store.path.glob("*.safetensors"))


@pytest.fixture
def store(tmp_path: Path) -> DiskStore:
    return open_disk(tmp_path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the disk store's clock on."""
    now = [time.time()]
    monkeypatch.setattr(disk, "time", SimpleNamespace(time=lambda: now[0], time_ns=lambda: int(now[0] * 1e9)))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


# ---- every store -------------------------------------------------------------------------------------------------


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
    kept = any_store.get(two)
    assert kept is not None and same(kept, chunk)
    assert [entry.key for entry in any_store.entries()] == [two]
    assert any_store.stats().entries == 1
    assert any_store.put(one, make("chunk number 0")) and any_store.get(one) is not None


def test_a_second_put_changes_nothing(any_store: ChunkStore) -> None:
    ((key, chunk),) = fill(any_store, 1)
    before = any_store.stats()
    assert any_store.put(key, make(chunk.text, seed=99))
    got = any_store.get(key)
    assert got is not None and same(got, chunk)
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
    got = any_store.get(key)
    assert got is not None and same(got, chunk)


def test_views_are_stored_by_value(any_store: ChunkStore) -> None:
    big = make("a view", tokens=12)
    view = replace(
        big, ids=big.ids[::2], offsets=big.offsets[::2], keys=big.keys[:, :, ::2], values=big.values[:, :, ::2]
    )
    key = MODEL.key(view.text)
    assert any_store.put(key, view)
    got = any_store.get(key)
    assert got is not None and same(got, view)


TEXTS = ["a\0b", "🦊👩‍👧", "שלום \u202eabc", '"}],\\u0022 </script>\n\t\x1b', "e\u0301", "x" * 200_000, "\u2028\x85"]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives(any_store: ChunkStore, tmp_path: Path, text: str) -> None:
    chunk, key = make(text), MODEL.key(text)
    assert any_store.put(key, chunk)
    got = any_store.get(key)
    assert got is not None and same(got, chunk)
    if not isinstance(any_store, MemoryStore):
        reopened = open_disk(tmp_path)
        assert [entry.text for entry in reopened.entries()] == [text]
        got = reopened.get(key)
        assert got is not None and same(got, chunk)


def test_a_text_that_no_file_can_hold_is_not_kept_and_does_no_harm(store: DiskStore) -> None:
    text = "lone \ud800 surrogate"
    key = MODEL.key(text)
    assert store.put(key, make(text)) is False
    assert store.get(key) is None and store.stats().failed_puts == 1
    assert len(fill(store, 2)) == 2
    tiers = TieredStore(MemoryStore(HUGE), store)
    assert tiers.put(key, make(text)) is True and tiers.get(key) is not None  # memory can hold it


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
        got = fresh.get(entry.key)
        assert got is not None and same(got, chunks[entry.key])


# ---- P1: atomic publication --------------------------------------------------------------------------------------

KILLED = """
import os, sys
import torch
from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import DiskStore, files
folder, when = sys.argv[1:]
namespace = Namespace({"model": "m"})
text = "a chunk that is being written"
chunk = ChunkKV(text, torch.arange(3), torch.zeros(3, 2, dtype=torch.long), torch.ones(2, 1, 3, 4),
                torch.ones(2, 1, 3, 4), 0)
store = DiskStore(folder, namespace, 1 << 30)
write = os.write
def half(descriptor, data):
    if len(data) < 200:  # the note of what is used
        return write(descriptor, data)
    write(descriptor, data[: len(data) // 2])
    os._exit(9)
def kill(*_):
    os._exit(9)
if when == "write":
    files.os.write = half
else:
    files.os.replace = kill
store.put(namespace.key(text), chunk)
os._exit(0)
"""


def test_a_process_killed_while_writing_leaves_garbage_only(tmp_path: Path) -> None:
    namespace, text = Namespace({"model": "m"}), "a chunk that is being written"
    key = namespace.key(text)
    moments = ["write", "replace"]
    running = {when: subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / when), when]) for when in moments}
    assert {when: process.wait(120) for when, process in running.items()} == {"write": 9, "replace": 9}
    for when in moments:
        folder = tmp_path / when / namespace.digest[:32]
        temporary = [file.name for file in folder.iterdir() if file.name != "namespace.json"]
        assert len(temporary) == 1 and temporary[0].startswith(".tmp-")
        store = open_disk(tmp_path / when, namespace=namespace)
        assert store.get(key) is None and key not in store and store.stats().entries == 0
        assert (folder / temporary[0]).exists(), "it could be another process at work"
        hours_ago = time.time() - 2 * 3600
        os.utime(folder / temporary[0], (hours_ago, hours_ago))
        open_disk(tmp_path / when, namespace=namespace)
        assert [file.name for file in folder.iterdir()] == ["namespace.json"]


def test_the_sweep_takes_old_temporary_files_only(store: DiskStore, tmp_path: Path) -> None:
    ((key, _),) = fill(store, 1)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in (".tmp-1-old", ".tmp-2-new", "notes.txt", f"{key}.bad"):
        (store.path / name).write_text("x")
    (store.path / ".tmp-3-link").symlink_to(outside)
    (store.path / ".tmp-4-folder").mkdir()
    long_ago = time.time() - 7200
    for name in (".tmp-1-old", "notes.txt", f"{key}.safetensors", ".tmp-4-folder"):
        os.utime(store.path / name, (long_ago, long_ago))
    os.utime(outside, (long_ago, long_ago))
    os.utime(store.path / ".tmp-3-link", (long_ago, long_ago), follow_symlinks=False)
    reopened = open_disk(tmp_path)
    names = {file.name for file in store.path.iterdir()}
    assert ".tmp-1-old" not in names
    assert {".tmp-2-new", "notes.txt", f"{key}.bad", ".tmp-3-link", ".tmp-4-folder"} <= names
    assert outside.read_text() == "precious" and key in reopened


def test_no_reader_sees_a_part_of_a_file(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = make("written in small pieces", tokens=200)
    key, write, seen = MODEL.key(chunk.text), os.write, []

    def short(descriptor: int, data: memoryview) -> int:
        seen.append(path_of(store, key).exists())
        return write(descriptor, data[:1000])

    monkeypatch.setattr(files.os, "write", short)
    assert store.put(key, chunk)
    monkeypatch.undo()
    assert len(seen) > 5 and not any(seen)
    assert same(format.load(path_of(store, key).read_bytes(), key, MODEL), chunk)


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


def test_files_are_private(store: DiskStore) -> None:
    ((key, _),) = fill(store, 1)
    for file in store.path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    assert path_of(store, key).exists()


# ---- P2, P3, P10: immutable, self-describing, apart --------------------------------------------------------------


def test_a_file_never_changes(store: DiskStore) -> None:
    ((key, chunk),) = fill(store, 1)
    before, status = path_of(store, key).read_bytes(), path_of(store, key).stat()
    assert store.put(key, make(chunk.text, seed=7))
    assert path_of(store, key).read_bytes() == before and path_of(store, key).stat().st_ino == status.st_ino


def test_the_second_of_two_processes_that_put_a_chunk_changes_nothing(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    chunk = make("the same text, computed twice")
    key = MODEL.key(chunk.text)
    assert one.put(key, chunk)
    later(one.path)
    before = path_of(one, key).read_bytes()
    assert two.put(key, make(chunk.text, seed=1))  # the same to rounding, say
    assert path_of(one, key).read_bytes() == before
    for side in (one, two):
        got = side.get(key)
        assert got is not None and same(got, chunk)


def test_the_index_is_rebuilt_from_the_files_alone(store: DiskStore, tmp_path: Path) -> None:
    chunks = fill(store, 4)
    elsewhere = tmp_path / "copy"
    target = elsewhere / store.path.name
    target.mkdir(parents=True)
    for file in store.path.glob("*.safetensors"):
        shutil.copy(file, target)
    copy = open_disk(elsewhere)
    assert sorted(copy.entries(), key=lambda e: e.key) == sorted(store.entries(), key=lambda e: e.key)
    for key, chunk in chunks:
        got = copy.get(key)
        assert got is not None and same(got, chunk)
    assert copy.stats().rejected == {}


def test_the_folder_says_what_it_belongs_to(store: DiskStore) -> None:
    assert json.loads((store.path / "namespace.json").read_text()) == MODEL.fields
    assert store.path.name == MODEL.digest[:32]


def test_namespaces_are_apart(tmp_path: Path) -> None:
    mine, theirs = open_disk(tmp_path), open_disk(tmp_path, namespace=OTHER)
    ((key, chunk),) = fill(mine, 1)
    assert mine.path != theirs.path and key != OTHER.key(chunk.text)
    for wanted in (key, OTHER.key(chunk.text)):
        assert theirs.get(wanted) is None and wanted not in theirs
    assert list(theirs.entries()) == []


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


@pytest.mark.parametrize("key", ["../outside", "../../outside", "sub/folder", "not-a-digest", "A" * 64, ""])
def test_a_key_that_is_no_digest_reaches_no_file(store: DiskStore, tmp_path: Path, key: str) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    fill(store, 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert store.get(key) is None and key not in store
    assert store.put(key, make("x")) is False
    store.delete([key])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ---- P4: damage --------------------------------------------------------------------------------------------------


def accepted(data: bytes, key: str, chunk: ChunkKV) -> bool:
    """Whether these bytes are served although they are not this chunk; anything but `Rejected` fails the test."""
    try:
        return not same(format.load(data, key, MODEL), chunk)
    except format.Rejected:
        return False


def test_a_flipped_bit_anywhere_in_the_header_is_not_served() -> None:
    chunk = make('text with "quotes", a \\ and 🦊')
    key = MODEL.key(chunk.text)
    good = format.dump(key, chunk, MODEL)
    size = 8 + int.from_bytes(good[:8], "little")
    wrong = []
    for at in range(size):
        for bit in range(8):
            data = bytearray(good)
            data[at] ^= 1 << bit
            if accepted(bytes(data), key, chunk):
                wrong.append((good[max(0, at - 16) : at + 4], chr(data[at])))
    assert not wrong, wrong[:5]


def test_a_flipped_bit_anywhere_in_the_tensors_is_not_served() -> None:
    chunk = make("some text")
    key = MODEL.key(chunk.text)
    good = format.dump(key, chunk, MODEL)
    for at in range(8 + int.from_bytes(good[:8], "little"), len(good)):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        with pytest.raises(format.Rejected):
            format.load(bytes(data), key, MODEL)


def test_a_file_cut_or_continued_anywhere_is_not_served() -> None:
    chunk = make("some text")
    key = MODEL.key(chunk.text)
    good = format.dump(key, chunk, MODEL)
    for length in range(len(good)):
        with pytest.raises(format.Rejected):
            format.load(good[:length], key, MODEL)
    for more in (b"\0", b" ", b"\0" * 8, b"x" * 4096, good):
        with pytest.raises(format.Rejected):
            format.load(good + more, key, MODEL)


@cache  # the order of a header's fields differs from one file to the next
def two_files() -> list[tuple[str, ChunkKV, bytes]]:
    chunks = [make("one text"), make("two text", seed=1, position=3)]
    return [(key := MODEL.key(chunk.text), chunk, format.dump(key, chunk, MODEL)) for chunk in chunks]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_are_never_served_and_raise_nothing(data: st.DataObject) -> None:
    (key, chunk, good), (_, _, donor) = two_files()
    mutated = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at, size = data.draw(st.integers(0, len(mutated))), data.draw(st.integers(0, 80))
        kind = data.draw(st.sampled_from(["write", "insert", "delete", "copy"]))
        if kind == "write":
            new = data.draw(st.binary(min_size=size, max_size=size))
        elif kind == "insert":
            new, size = data.draw(st.binary(max_size=40)), 0
        elif kind == "delete":
            new = b""
        else:
            new = donor[at : at + size]
        mutated[at : at + size] = new
    assert not accepted(bytes(mutated), key, chunk)


def test_a_header_that_is_too_large_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    good = format.dump(MODEL.key("x"), make("x"), MODEL)
    length = int.from_bytes(good[:8], "little")
    padded = good[8 : 8 + length].ljust(format.MAX_HEADER + 8)
    monkeypatch.setattr(format, "json", None)
    with pytest.raises(format.Rejected, match="too large"):
        format.header(len(padded).to_bytes(8, "little") + padded)


Damage = Callable[[DiskStore, str, ChunkKV], None]


def _overwrite(change: Callable[[bytes], bytes]) -> Damage:
    def damage(store: DiskStore, key: str, chunk: ChunkKV) -> None:
        path = path_of(store, key)
        path.write_bytes(change(path.read_bytes()))

    return damage


def _shaped(**changes: Any) -> Damage:
    """A file with a good checksum over tensors that are no chunk's."""

    def damage(store: DiskStore, key: str, chunk: ChunkKV) -> None:
        path_of(store, key).write_bytes(format.dump(key, replace(chunk, **changes), MODEL))

    return damage


def _foreign(store: DiskStore, key: str, chunk: ChunkKV) -> None:
    path_of(store, key).write_bytes(format.dump(key, chunk, OTHER))


def _swapped(store: DiskStore, key: str, chunk: ChunkKV) -> None:
    other = make("another text", seed=5)
    path_of(store, key).write_bytes(format.dump(MODEL.key(other.text), other, MODEL))


def _relabelled(store: DiskStore, key: str, chunk: ChunkKV) -> None:
    other = make("another text", seed=5)  # says that it is this key's
    path_of(store, key).write_bytes(format.dump(key, other, MODEL))


def _spliced(store: DiskStore, key: str, chunk: ChunkKV) -> None:
    other = make(chunk.text, seed=5)
    mine, theirs = format.dump(key, chunk, MODEL), format.dump(key, other, MODEL)
    assert len(mine) == len(theirs)
    head = 8 + int.from_bytes(mine[:8], "little")
    path_of(store, key).write_bytes(mine[:head] + theirs[head:])


def _header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(store: DiskStore, key: str, chunk: ChunkKV) -> None:
        data = format.dump(key, chunk, MODEL)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        new = json.dumps(change(header)).encode()
        path_of(store, key).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return damage


def _metadata(**changes: Any) -> Damage:
    return _header(lambda h: h | {"__metadata__": h["__metadata__"] | changes})


def _lacking(name: str) -> Damage:
    return _header(lambda h: h | {"__metadata__": {k: v for k, v in h["__metadata__"].items() if k != name}})


BAD_FILES: dict[str, Damage] = {
    "empty": _overwrite(lambda data: b""),
    "seven bytes": _overwrite(lambda data: data[:7]),
    "header only": _overwrite(lambda data: data[: 8 + int.from_bytes(data[:8], "little")]),
    "one byte short": _overwrite(lambda data: data[:-1]),
    "one byte long": _overwrite(lambda data: data + b"\0"),
    "twice": _overwrite(lambda data: data + data),
    "last bit": _overwrite(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "zeros": _overwrite(lambda data: bytes(len(data))),
    "zeros behind the header": _overwrite(lambda data: data[: len(data) - 64] + bytes(64)),
    "header of 2^62 bytes": _overwrite(lambda data: (1 << 62).to_bytes(8, "little") + data[8:]),
    "header of 2^64 - 1 bytes": _overwrite(lambda data: b"\xff" * 8 + data[8:]),
    "header too large": _overwrite(lambda data: (format.MAX_HEADER + 1).to_bytes(8, "little") + data[8:]),
    "header beyond the end": _overwrite(lambda data: (len(data) + 1).to_bytes(8, "little") + data[8:]),
    "deeply nested header": _overwrite(lambda data: (60_000).to_bytes(8, "little") + b"[" * 60_000),
    "header is no object": _header(lambda h: [h]),
    "no metadata": _header(lambda h: {k: v for k, v in h.items() if k != "__metadata__"}),
    "metadata is a list": _header(lambda h: h | {"__metadata__": ["format"]}),
    "metadata is null": _header(lambda h: h | {"__metadata__": None}),
    "other format": _metadata(format="cacheclip-rag/999"),
    "says another key": _metadata(key="0" * 64),
    "text is a number": _metadata(text=5),
    "text is null": _metadata(text=None),
    "text is another": _metadata(text="another text"),
    "position is no number": _metadata(position="ten"),
    "position is a list": _metadata(position=[16]),
    "no checksum": _lacking("checksum"),
    "no position": _lacking("position"),
    "no text": _lacking("text"),
    "dtype lies": _header(lambda h: h | {"keys": h["keys"] | {"dtype": "F16"}}),
    "shape lies": _header(lambda h: h | {"keys": h["keys"] | {"shape": [3, 2, 5, 4]}}),
    "tensors overlap": _header(lambda h: h | {"keys": h["values"]}),
    "foreign namespace": _foreign,
    "another key's file": _swapped,
    "another chunk's file under this key": _relabelled,
    "another file's tensors": _spliced,
    "ids of another length": _shaped(ids=torch.arange(4)),
    "ids without a length": _shaped(ids=torch.tensor(3)),
    "ids in two dimensions": _shaped(ids=torch.arange(10).reshape(5, 2)),
    "ids of another type": _shaped(ids=torch.arange(5, dtype=torch.int32)),
    "offsets of another shape": _shaped(offsets=torch.arange(5)),
    "offsets of another type": _shaped(offsets=torch.zeros(5, 2)),
    "keys in three dimensions": _shaped(keys=torch.zeros(2, 5, 4)),
    "keys without dimensions": _shaped(keys=torch.tensor(0.0), values=torch.tensor(0.0)),
    "keys of another length": _shaped(keys=torch.zeros(2, 3, 6, 4), values=torch.zeros(2, 3, 6, 4)),
    "values of another shape": _shaped(values=torch.zeros(2, 3, 5, 8)),
    "values of another type": _shaped(values=torch.zeros(2, 3, 5, 4, dtype=torch.float64)),
}


@pytest.mark.parametrize("when", ["after opening", "before opening"])
@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_a_miss(tmp_path: Path, name: str, when: str) -> None:
    store = open_disk(tmp_path)
    good = make("a good neighbour", seed=3)
    assert store.put(MODEL.key(good.text), good)
    chunk = make("the chunk")
    key = MODEL.key(chunk.text)
    assert store.put(key, chunk)
    BAD_FILES[name](store, key, chunk)
    if when == "before opening":
        store = open_disk(tmp_path)
    assert store.get(key) is None
    assert key not in store and [entry.key for entry in store.entries()] == [MODEL.key(good.text)]
    assert sum(store.stats().rejected.values()) == 1
    assert not path_of(store, key).exists() and path_of(store, key).with_suffix(".bad").exists()
    kept = store.get(MODEL.key(good.text))
    assert kept is not None and same(kept, good)
    assert store.put(key, chunk)  # and all is well again
    got = store.get(key)
    assert got is not None and same(got, chunk)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), OSError(errno.EIO, "bad"), MemoryError()])
def test_an_unreadable_file_is_a_miss_for_now(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    ((key, chunk),) = fill(store, 1)

    def fail(*_: object) -> bytes:
        raise error

    monkeypatch.setattr(files, "contents", fail)
    assert store.get(key) is None
    assert store.stats().rejected == {"unreadable": 1} and store.stats().misses == 1
    monkeypatch.undo()
    got = store.get(key)
    assert got is not None and same(got, chunk)


def test_a_file_that_vanished_is_a_miss(store: DiskStore) -> None:
    (one, _), (two, _) = fill(store, 2)
    path_of(store, one).unlink()
    assert store.get(one) is None and one not in store and store.get(two) is not None
    assert store.put(one, make("chunk number 0")) and store.get(one) is not None


def test_a_folder_in_the_place_of_a_file_is_a_miss(store: DiskStore, tmp_path: Path) -> None:
    (one, _), (two, _) = fill(store, 2)
    path_of(store, one).unlink()
    path_of(store, one).mkdir()
    assert store.get(one) is None and store.put(two, make("chunk number 1"))
    reopened = open_disk(tmp_path)
    assert reopened.get(one) is None and reopened.get(two) is not None


def test_one_entry_that_cannot_be_looked_at_does_not_hide_the_others(store: DiskStore, tmp_path: Path) -> None:
    # A dangling link here; in life, a file that another process evicts while this one lists the folder.
    ((key, chunk),) = fill(store, 1)
    path_of(store, "0" * 64).symlink_to(tmp_path / "nowhere")
    reopened = open_disk(tmp_path)
    got = reopened.get(key)
    assert got is not None and same(got, chunk)


def test_other_files_in_the_folder_are_nobody_s_business(store: DiskStore, tmp_path: Path) -> None:
    ((key, _),) = fill(store, 1)
    names = ["README", "abc.safetensors", "A" * 64 + ".safetensors", "0" * 64, "0" * 64 + ".bad", ".safetensors"]
    for name in names:
        (store.path / name).write_text("x")
    reopened = open_disk(tmp_path)
    assert [entry.key for entry in reopened.entries()] == [key] and reopened.stats().rejected == {}
    assert set(names) <= {file.name for file in store.path.iterdir()}


# ---- P7, P8: bounded; full and read-only disks -------------------------------------------------------------------


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
    for age, key in zip((4000, 3000, 2000, 1000), keys, strict=True):
        os.utime(path_of(store, key), (time.time() - age, time.time() - age))
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
    got = store.get(MODEL.key(new.text))
    assert got is not None and same(got, new)


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
    got = reopened.get(key)
    assert got is not None and same(got, chunk)
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


# ---- P9: two stores over one folder ------------------------------------------------------------------------------


def test_two_stores_over_one_folder_see_each_other_s_chunks(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    assert two.refresh() is False
    chunks = fill(one, 3)
    later(one.path)
    assert two.refresh() is True
    for key, chunk in chunks:
        got = two.get(key)
        assert got is not None and same(got, chunk)
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
    got = two.get(MODEL.key("second"))
    assert got is not None and same(got, second)


def test_a_chunk_that_another_process_evicted_is_a_miss(tmp_path: Path) -> None:
    one, two = open_disk(tmp_path), open_disk(tmp_path)
    ((key, chunk),) = fill(one, 1)
    later(one.path)
    two.refresh()
    one.delete([key])
    assert two.get(key) is None and key not in two
    assert two.put(key, chunk) and two.get(key) is not None


def test_a_cap_counts_what_other_processes_stored(tmp_path: Path) -> None:
    size = len(format.dump(MODEL.key("chunk number 0"), make("chunk number 0"), MODEL))
    one, two = open_disk(tmp_path, cap=5 * size), open_disk(tmp_path, cap=5 * size)
    fill(one, 4)
    later(one.path)
    for number in range(4):
        assert two.put(MODEL.key(f"two's {number}"), make(f"two's {number}", seed=number))
        assert bytes_on_disk(two) <= two.cap


# ---- memory ------------------------------------------------------------------------------------------------------


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
    memory = Memory(3 * size)
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


# ---- tiers -------------------------------------------------------------------------------------------------------


def test_the_nearer_tiers_take_a_copy_of_what_a_farther_one_serves(tmp_path: Path) -> None:
    nearest, near, far = MemoryStore(HUGE), MemoryStore(HUGE), open_disk(tmp_path)
    ((key, chunk),) = fill(far, 1)
    tiers = TieredStore(nearest, near, far)
    assert key in tiers and key not in nearest and key not in near
    got = tiers.get(key)
    assert got is not None and same(got, chunk) and key in nearest and key in near
    path_of(far, key).unlink()
    again = tiers.get(key)
    assert again is not None and same(again, chunk)


def test_the_far_tier_keeps_what_the_near_one_evicts(tmp_path: Path) -> None:
    memory, far = MemoryStore(2 * make("x").nbytes), open_disk(tmp_path)
    tiers = TieredStore(memory, far)
    chunks = fill(tiers, 6)
    assert memory.stats().entries == 2 and far.stats().entries == 6 == tiers.stats().entries
    for key, chunk in chunks:
        got = tiers.get(key)
        assert got is not None and same(got, chunk)
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
