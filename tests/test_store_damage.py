"""Damaged, foreign and forged files are misses; none is served, runs anything or costs more than its own chunk."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import MODEL, OTHER, fill, make, open_disk, path_of, put, same

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.store import DiskStore, files, format


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
    assert same(store.get(MODEL.key(good.text)), good)
    assert store.put(key, chunk)  # and all is well again
    assert same(store.get(key), chunk)


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
    assert same(store.get(key), chunk)


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
    assert same(reopened.get(key), chunk)


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


def test_a_file_larger_than_the_whole_store_may_be_is_not_read(tmp_path: Path) -> None:
    store = open_disk(tmp_path, cap=1 << 20)
    key = put(store, "text 0")
    with open(path_of(store, key), "r+b") as file:
        file.truncate(1 << 40)
    assert store.get(key) is None and store.stats().rejected == {"unreadable": 1}


def test_a_file_with_a_great_many_tensors_is_not_loaded() -> None:
    chunk = replace(make("many"), extra={f"n{i}": torch.zeros(8) for i in range(format.MAX_TENSORS)})
    with pytest.raises(format.Rejected, match="too many tensors"):
        format.load(format.dump(MODEL.key("many"), chunk, MODEL), MODEL.key("many"), MODEL)


def test_nothing_is_ever_unpickled() -> None:
    package = Path(format.__file__).parent
    for source in package.glob("*.py"):
        text = source.read_text()
        assert not re.search(r"pickle|(?<!safetensors\.)torch\.load|\beval\(|\bexec\(|sqlite", text), source.name
