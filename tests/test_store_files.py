"""A store's files: published whole, never changed, all there is to it, swept after crashes, read in old formats."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import (
    HOLES,
    MODEL,
    OTHER,
    SIZE,
    age,
    fill,
    later,
    make,
    open_disk,
    path_of,
    put,
    same,
    sparse,
    whole_reads,
)

from cacheclip_rag.chunks import Namespace
from cacheclip_rag.store import DiskStore, files, format
from cacheclip_rag.store.admin import Administration

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


@pytest.mark.parametrize("opened_by", [MODEL, OTHER], ids=["the model", "another model"])
def test_the_sweep_takes_old_temporary_files_only(store: DiskStore, tmp_path: Path, opened_by: Namespace) -> None:
    ((key, _),) = fill(store, 1)
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in (".tmp-1-old", ".tmp-2-new", "notes.txt", f"{key}.bad"):
        (store.path / name).write_text("x")
    (store.path / ".tmp-3-link").symlink_to(outside)
    (store.path / ".tmp-4-folder").mkdir()
    for name in (".tmp-1-old", "notes.txt", f"{key}.safetensors", ".tmp-4-folder", ".tmp-3-link"):
        age(store.path / name, 7200)
    age(outside, 7200)
    open_disk(tmp_path, opened_by)
    names = {file.name for file in store.path.iterdir()}
    assert ".tmp-1-old" not in names
    assert {".tmp-2-new", "notes.txt", f"{key}.bad", ".tmp-3-link", ".tmp-4-folder"} <= names
    assert outside.read_text() == "precious" and store.get(key) is not None


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
        assert same(side.get(key), chunk)


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
        assert same(copy.get(key), chunk)
    assert copy.stats().rejected == {}


def test_losing_everything_but_the_chunks_loses_nothing(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key = put(store, "text 0")
    for path in (tmp_path / ".usage", tmp_path / ".lock", store.path / "namespace.json"):
        path.unlink()
    again = open_disk(tmp_path)
    assert same(again.get(key), make("text 0"))
    assert (store.path / "namespace.json").exists() and again.put(MODEL.key("text 1"), make("text 1"))


def test_the_folder_says_what_it_belongs_to(store: DiskStore) -> None:
    assert json.loads((store.path / "namespace.json").read_text()) == MODEL.fields
    assert store.path.name == MODEL.digest[:32]


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


def test_other_files_in_the_folder_are_nobody_s_business(store: DiskStore, tmp_path: Path) -> None:
    ((key, _),) = fill(store, 1)
    names = ["README", "abc.safetensors", "A" * 64 + ".safetensors", "0" * 64, "0" * 64 + ".bad", ".safetensors"]
    for name in names:
        (store.path / name).write_text("x")
    reopened = open_disk(tmp_path)
    assert [entry.key for entry in reopened.entries()] == [key] and reopened.stats().rejected == {}
    assert set(names) <= {file.name for file in store.path.iterdir()}


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
        newer = Namespace({**MODEL.fields, "format": "cacheclip-rag/2"})
        key = put(open_disk(tmp_path, newer), "text 0")
    store = open_disk(tmp_path)
    assert store.get(key) is None and store.get(MODEL.key("text 0")) is None and list(store.entries()) == []
    usage = {one.name: one for one in Administration(tmp_path).usage()}[newer.digest[:32]]
    assert (usage.entries, usage.unreadable) == (1, 1)
    assert (tmp_path / newer.digest[:32] / f"{key}.safetensors").exists()


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


def test_no_memory_is_left_behind(tmp_path: Path) -> None:
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    store = open_disk(tmp_path)
    chunk = make("large", tokens=8192)

    def rounds(count: int) -> None:
        for _ in range(count):
            key = MODEL.key("large")
            assert store.put(key, chunk) and same(store.get(key), chunk)
            with open(path_of(store, key), "r+b") as file:
                file.truncate(1 << 20)
            assert store.get(key) is None
            store.delete([key])

    rounds(5)
    before = resident()
    rounds(60)
    assert resident() - before < 10 * chunk.nbytes
    assert store.stats().entries == 0 and store.vanished() == []
    assert [path.name for path in store.path.iterdir()] == ["namespace.json"]


def test_only_one_module_touches_the_file_system() -> None:
    package = Path(format.__file__).parent
    access = re.compile(
        r"\bopen\(|\bos\.(?!stat_result)|\bshutil\b|\.(write|read)_(bytes|text)\(|\.(unlink|mkdir|stat|exists)\(\)"
    )
    for source in package.glob("*.py"):
        if source.name == "files.py":
            continue
        assert not [line for line in source.read_text().splitlines() if access.search(line)], source.name


@pytest.mark.parametrize("secret", [b"", b"correct horse"])
@pytest.mark.parametrize("tensor", [None, "extra.more"])
def test_a_file_with_holes_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str | None, secret: bytes
) -> None:
    namespace = replace(MODEL, secret=secret)
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
    chunk = replace(make("text 0", tokens=8), extra={"zeros": torch.zeros((8, 1 << 20), dtype=torch.uint8)})
    key = MODEL.key("text 0")
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
