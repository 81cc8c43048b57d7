"""What is forgotten leaves nothing behind: no file, no copy in memory, nothing that was computed with it."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from stores import HUGE, KEYED, MODEL, OTHER, holds, later, make, open_disk, path_of, put

from cacheclip_rag.errors import StoreError
from cacheclip_rag.store import MemoryStore, TieredStore, files, format
from cacheclip_rag.store.admin import Administration
from cacheclip_rag.store.holdings import occurs_in


def test_nothing_is_left_of_a_deleted_chunk(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    key, other = put(store, "a secret text"), put(store, "another text")
    path_of(store, key).write_bytes(path_of(store, key).read_bytes()[:-1])
    assert store.get(key) is None and holds(tmp_path, "a secret text"), "set aside"
    put(store, "a secret text")
    store.delete([key])
    assert not holds(tmp_path, "a secret text") and other in store


def test_forgetting_a_document_leaves_nothing_of_it(tmp_path: Path) -> None:
    stores = [open_disk(tmp_path, namespace) for namespace in (MODEL, OTHER, KEYED)]
    for store in stores:
        put(store, "the first half of the report"), put(store, "its other\n half"), put(store, "something else")
    bad = put(stores[0], "a half that is damaged")
    path_of(stores[0], bad).write_bytes(b"\x05garbage with a half that is damaged")
    stores[0].get(bad)
    data = path_of(stores[0], MODEL.key("its other\n half")).read_bytes()
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
    key = MODEL.key("a secret text")
    tiers.put(key, make("a secret text"))
    Administration(tmp_path).forget(lambda text: "secret" in text)
    assert tiers.refresh() is True
    assert tiers.get(key) is None and key not in tiers


def test_any_number_of_chunks_that_others_removed_are_dropped_from_memory(tmp_path: Path) -> None:
    store, other = open_disk(tmp_path), open_disk(tmp_path)
    data, keys = format.dump(MODEL.key("text"), make("text"), MODEL), [f"{number:064x}" for number in range(5000)]
    for key in keys:
        path_of(other, key).write_bytes(data.replace(MODEL.key("text").encode(), key.encode()))
    assert store.refresh() and store.stats().entries == 5000
    for key in keys:
        path_of(other, key).unlink()
    later(store.path)
    assert store.refresh() and sorted(store.vanished()) == keys and store.vanished() == []


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


def test_forgetting_a_text_forgets_what_was_computed_with_it(tmp_path: Path) -> None:
    store = open_disk(tmp_path)
    for text, context in (("a", ()), ("b", ("a secret", "c")), ("c", ("b",)), ("a secret", ())):
        assert store.put(MODEL.key(text, context), replace(make(text), context=context))
    gone = Administration(tmp_path).forget(lambda text: "secret" in text)
    assert {stored.text for stored in gone} == {"a secret", "b"}
    assert {stored.text for stored in Administration(tmp_path).entries()} == {"a", "c"}
    assert not any(b"a secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
