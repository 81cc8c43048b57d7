"""Forgetting a document: what is its own goes from memory, disk and every model's folder; what is shared stays."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from threads import join, start, until
from tiny import PASSAGES, tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Engine, StoreError
from cacheclip_rag.cli import main as cli
from cacheclip_rag.store import DiskStore, Documents, files
from cacheclip_rag.store.admin import Administration

BACKBONE, OTHER = tiny_backbone(), tiny_backbone("qwen2")


def open_engine(folder: Path | None, **options: Any) -> Engine:
    return Engine(options.pop("backbone", BACKBONE), method=options.pop("method", "naive"), store=folder, **options)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path / "kv", auxiliary=OTHER) as opened:
        yield opened


def known(engine: Engine) -> list[int]:
    return [number for number, text in enumerate(PASSAGES) if engine.knows(text)]


def traces(folder: Path, text: str) -> list[Path]:
    """Files in whose names or bytes a text, a part of it, or its digest is left."""
    marks = [text.encode(), text[20:60].encode(), hashlib.sha256(text.encode()).hexdigest().encode()]
    marks += [Documents(None, tenant).text(text).encode() for tenant in ("", "acme")]
    return [
        path
        for path in folder.rglob("*")
        if any(mark in os.fsencode(path.name) or (path.is_file() and mark in path.read_bytes()) for mark in marks)
    ]


def test_what_only_this_document_has_goes(engine: Engine, tmp_path: Path) -> None:
    engine.ensure(PASSAGES[:3], document="one")
    engine.ensure(PASSAGES[2:4], document="two")
    engine.forget_document("one")
    assert known(engine) == [2, 3]
    assert not traces(tmp_path / "kv", PASSAGES[0]) and not traces(tmp_path / "kv", PASSAGES[1])
    assert traces(tmp_path / "kv", PASSAGES[2])
    engine.forget_document("two")
    assert known(engine) == [] and not any(traces(tmp_path / "kv", text) for text in PASSAGES)
    assert engine.auxiliary is not None and engine.auxiliary.library.store.stats().entries == 0
    assert list((tmp_path / "kv" / "documents").iterdir()) == []


def test_the_trace_that_is_looked_for_would_be_found(engine: Engine, tmp_path: Path) -> None:
    engine.ensure(PASSAGES[:1], document="one")
    assert len(traces(tmp_path / "kv", PASSAGES[0])) == 3  # of two models, and the note


def test_several_documents_at_once_may_share_chunks_among_them(engine: Engine) -> None:
    engine.ensure(PASSAGES[:2], document="one")
    engine.ensure(PASSAGES[1:3], document="two")
    engine.ensure(PASSAGES[2:4], document="three")
    engine.forget_document("one", "two")
    assert known(engine) == [2, 3]


def test_it_is_known_after_a_restart_and_by_other_models(tmp_path: Path) -> None:
    for backbone in (BACKBONE, OTHER):
        with open_engine(tmp_path, backbone=backbone) as engine:
            engine.ensure(PASSAGES[:2], document="one")
            engine.ensure(PASSAGES[1:3], document="two")
    with open_engine(tmp_path) as engine:
        engine.forget_document("one")
        assert known(engine) == [1, 2] and not traces(tmp_path, PASSAGES[0])
    with open_engine(tmp_path, backbone=OTHER) as engine:
        assert known(engine) == [1, 2]


def test_a_chunk_that_was_evicted_is_its_document_s_when_it_comes_back(engine: Engine, tmp_path: Path) -> None:
    engine.ensure(PASSAGES[:1], document="one")
    engine.library.store.delete([engine.library.key(PASSAGES[0])])
    engine.ensure(PASSAGES[:1])  # as a prompt would have it
    engine.forget_document("one")
    assert known(engine) == [] and not traces(tmp_path / "kv", PASSAGES[0])


def test_forgetting_a_text_ends_every_document_s_claim_to_it(engine: Engine, tmp_path: Path) -> None:
    engine.ensure(PASSAGES[:1], document="one")
    engine.ensure(PASSAGES[:1], document="two")
    engine.forget(PASSAGES[:1])
    assert not traces(tmp_path / "kv", PASSAGES[0])


def test_what_was_computed_in_its_company_goes_too(engine: Engine, tmp_path: Path) -> None:
    engine.ensure(PASSAGES[:2], document="one")
    engine.ensure(PASSAGES[2:3], document="two")
    library = engine.library
    for context in ((PASSAGES[0],), (PASSAGES[2],)):
        kv = replace(library.encode(PASSAGES[3]), context=context)
        assert library.store.put(library.namespace.key(PASSAGES[3], context), kv)
    engine.forget_document("one")
    assert [entry.context for entry in library.store.entries() if entry.text == PASSAGES[3]] == [(PASSAGES[2],)]
    assert not traces(tmp_path / "kv", PASSAGES[0])
    engine.forget([PASSAGES[2]])
    assert not [entry for entry in library.store.entries() if entry.context]


def test_forgetting_a_text_reaches_all_encodings_of_it(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine:
        engine.ensure(PASSAGES[:1], method="promptcache", document="one")
        engine.ensure(PASSAGES[:1])
    with open_engine(tmp_path) as engine:  # that never asks for the other encoding
        engine.forget_document("one")
    assert not traces(tmp_path, PASSAGES[0])


def test_forgetting_texts_reaches_what_was_never_opened(tmp_path: Path) -> None:
    for backbone in (BACKBONE, OTHER):
        with open_engine(tmp_path, backbone=backbone) as engine:
            engine.ensure(PASSAGES[:2], method="psr")
            engine.fuse({PASSAGES[1]: [PASSAGES[0]]}, method="psr")
    with open_engine(tmp_path, tenant="acme") as acme, open_engine(tmp_path) as engine:
        acme.ensure(PASSAGES[:1])
        engine.forget(PASSAGES[:1])
        left = [stored for stored in Administration(tmp_path).entries() if stored.holds(lambda t: t == PASSAGES[0])]
        assert [stored.tenant for stored in left] == ["acme"]
        assert sum(stored.text == PASSAGES[1] for stored in Administration(tmp_path).entries()) == 2


def test_in_memory_documents_are_known_as_well() -> None:
    engine = open_engine(None)
    engine.ensure(PASSAGES[:2], document="one")
    engine.ensure(PASSAGES[1:2], document="two")
    engine.forget_document("one")
    assert known(engine) == [1]


@pytest.mark.parametrize("ahead", [0, 1], ids=["the task at hand", "a task that waits"])
def test_background_work_does_not_bring_it_back(engine: Engine, ahead: int) -> None:
    engine.ensure(PASSAGES[:1], document="one")
    engine.library.store.delete([engine.library.key(PASSAGES[0])])
    stream = engine.stream("Hello", max_new_tokens=4)
    next(stream)  # while it is open the background waits
    engine.ensure_later([*PASSAGES[3 : 3 + ahead], PASSAGES[0]])
    until(lambda: engine.corpus.background.busy)
    engine.forget_document("one")
    stream.close()
    engine.flush()
    assert known(engine) == [3, 4][:ahead]


def test_a_look_up_under_way_does_not_bring_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hint reads a file on a thread of its own while the text is forgotten."""
    with open_engine(tmp_path / "kv") as writer:
        writer.ensure(PASSAGES[:2])
    reading, forgotten, read = list[str](), threading.Event(), DiskStore.get

    def slow(self: DiskStore, key: str) -> Any:
        chunk = read(self, key)
        reading.append(key)
        assert forgotten.wait(30)
        return chunk

    with open_engine(tmp_path / "kv") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "get", slow)
            engine.hint(PASSAGES[:1])
            until(lambda: len(reading) == 1)
            engine.forget(PASSAGES[:1])
            forgotten.set()
            engine.hint(PASSAGES[1:2])
            until(lambda: len(reading) == 2)  # hints are read one after another, so the first is done
        assert known(engine) == [1]
        assert [entry.text for entry in engine.library.store.entries()] == [PASSAGES[1]]


def test_fusing_does_not_bring_back_what_another_process_forgot(tmp_path: Path) -> None:
    first, second = (open_engine(tmp_path, method="auto") for _ in range(2))
    first.ensure(PASSAGES[:2], document="one")
    first.ensure(PASSAGES[2:4], document="two")
    prompt = "\n\n".join(PASSAGES[:3])
    first.generate(prompt, max_new_tokens=1)
    first.generate(prompt, max_new_tokens=1)
    second.forget_document("one")
    assert first.fuse({PASSAGES[2]: [PASSAGES[0]]}).encoded == 0
    assert first.fuse_in_order([[PASSAGES[0], PASSAGES[2]]]).encoded == 0
    assert first.fuse_used().encoded == 0
    assert not traces(tmp_path, PASSAGES[0]) and not traces(tmp_path, PASSAGES[1])
    assert first.fuse({PASSAGES[2]: [PASSAGES[3], PASSAGES[0]]}).encoded == 1


def test_a_prompt_does_not_bring_back_what_another_process_forgot(tmp_path: Path) -> None:
    first, second = (open_engine(tmp_path) for _ in range(2))
    first.ensure(PASSAGES[:2], document="one")
    first.ensure(PASSAGES[2:3], document="two")
    prompt = "\n\n".join(PASSAGES[:3]) + "?"
    first.generate(prompt, method="cachecraft", max_new_tokens=1)
    assert first.variants_of("cachecraft", PASSAGES[0])
    second.forget_document("one")
    report = first.generate(prompt, max_new_tokens=1).report
    first.flush()
    assert [use.key for use in report.chunks] == [first.library.key(PASSAGES[2])] and report.fallbacks == []
    assert not any(first.variants_of("cachecraft", text) for text in PASSAGES)
    assert known(first) == [2] and not traces(tmp_path, PASSAGES[0]) and not traces(tmp_path, PASSAGES[1])
    first.ensure(PASSAGES[:1])  # asked for anew
    second.generate(prompt, max_new_tokens=1)
    assert known(first) == known(second) == [0, 2]


def test_background_work_does_not_bring_back_what_another_process_forgot(tmp_path: Path) -> None:
    first, second = (open_engine(tmp_path) for _ in range(2))
    first.ensure(PASSAGES[:3])
    with first.lock:  # nothing can be encoded meanwhile
        first.ensure_later([PASSAGES[3], PASSAGES[0]])  # the second waits behind the first
        until(lambda: first.lock.waiting == 1)
        second.forget(PASSAGES[:1])
        prompt = start(lambda: first.generate("Hello there.", max_new_tokens=1))
        until(lambda: first.lock.waiting == 2)  # it comes between the two, and takes note of the forgetting
    join(prompt)
    first.flush()
    assert known(first) == [1, 2, 3] and not traces(tmp_path, PASSAGES[0])


def test_what_is_kept_in_another_encoding_stays_known(tmp_path: Path) -> None:
    first, second = (open_engine(tmp_path) for _ in range(2))
    first.ensure(PASSAGES[:1])
    first.ensure(PASSAGES[:1], method="promptcache")
    second.library.store.delete([second.library.key(PASSAGES[0])])  # evicted there
    report = first.generate(PASSAGES[0] + "\n\nWho?", method="promptcache", max_new_tokens=1).report
    assert report.reused > 0


@pytest.mark.parametrize("auxiliary", [False, True])
def test_what_cannot_be_removed_is_not_said_to_be_forgotten(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, auxiliary: bool
) -> None:
    engine.ensure(PASSAGES[:2], document="one")
    assert engine.auxiliary is not None
    stuck = engine.auxiliary.library.namespace if auxiliary else engine.library.namespace
    remove = files.remove

    def refuse(path: Path) -> None:
        if path.parent.name == stuck.digest[:32] and path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "no")
        remove(path)

    for forget in (lambda: engine.forget(PASSAGES[:2]), lambda: engine.forget_document("one")):
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", refuse)
            with pytest.raises(StoreError, match="removed"):
                forget()
        assert len(engine.documents.of("one")) == 2  # and so it can be repeated
    engine.forget(PASSAGES[:2])
    assert known(engine) == [] and not list(engine.library.store.entries())


def test_a_full_disk_is_told_and_serves_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(tmp_path) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "put", lambda *_: False)
            result = engine.ensure(PASSAGES[:2])
        assert len(result.skipped) == 2 and result.keys == [] and "keep" in result.skipped[0][1]
        assert engine.generate("\n\n".join(PASSAGES[:2]) + "?", max_new_tokens=1).report.reused > 0


def test_tenants_have_documents_of_their_own(tmp_path: Path) -> None:
    with open_engine(tmp_path, tenant="acme") as acme, open_engine(tmp_path, tenant="zenith") as zenith:
        for engine in (acme, zenith):
            engine.ensure(PASSAGES[:1], document="one")
        acme.forget_document("one")
        assert (known(acme), known(zenith)) == ([], [0])
        zenith.forget_document("two")
        assert known(zenith) == [0]


def test_names_are_digests_and_keyed_ones_with_a_secret(tmp_path: Path) -> None:
    Documents(tmp_path).add("../../etc/passwd\0\ud800", ["text"])
    Documents(tmp_path, secret=b"secret").add("one", ["text"])
    plain, keyed = Documents(tmp_path), Documents(tmp_path, secret=b"secret")
    assert plain.of("../../etc/passwd\0\ud800") == {plain.text("text")}
    assert keyed.of("one") == {keyed.text("text")} and keyed.text("text") != plain.text("text")
    assert plain.of("one") == frozenset()
    assert all(path.stat().st_size == 0 and path.stat().st_mode & 0o777 == 0o600 for path in plain.path.iterdir())
    assert plain.path.stat().st_mode & 0o777 == 0o700


def test_documents_that_differ_by_blanks_are_different(tmp_path: Path) -> None:
    documents = Documents(tmp_path)
    documents.add("one", ["text"])
    assert documents.of("one ") == frozenset() and documents.of("one")


def test_what_cannot_be_noted_is_not_stored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files, "mark", full)
        result = engine.ensure(PASSAGES[:2], document="one")
    assert len(result.skipped) == 2 and "no space left" in result.skipped[0][1] and known(engine) == []
    with monkeypatch.context() as patch:
        patch.setattr(files, "mark", lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
        engine.ensure(PASSAGES[:2], document="one")
    assert known(engine) == [0, 1]
    engine.forget_document("one")
    assert known(engine) == []


def test_a_forgetting_that_was_interrupted_can_be_repeated(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.ensure(PASSAGES[:3], document="one")
    remove, count, stop = files.remove, 0, 0

    def dying(path: Path) -> None:
        nonlocal count
        count += 1
        if count > stop:
            raise OSError(errno.EIO, "input/output error")
        remove(path)

    for last in range(1, 25, 3):
        stop, count = last, 0
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", dying)
            try:
                engine.forget_document("one")
            except StoreError:
                assert engine.documents.of("one") or not traces(tmp_path / "kv", PASSAGES[0])
    engine.forget_document("one")
    assert not any(traces(tmp_path / "kv", text) for text in PASSAGES)


def test_who_notes_and_removes_at_the_same_time_undoes_nothing(tmp_path: Path) -> None:
    """Objects share nothing but the folder, so threads stand for processes."""

    def note(process: int) -> None:
        documents = Documents(tmp_path)
        for number in range(10):
            documents.add("shared", [f"text {process} {number}"])
            documents.add(f"own {process}", [f"text {process} {number}", f"own {number}"])
        documents.remove([f"own {process}"])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(note, range(4)))
    documents = Documents(tmp_path)
    assert len(documents.of("shared")) == 40 and documents.of("own 1") == frozenset()


# ---- the command -------------------------------------------------------------------------------------------------


def forget(folder: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["store", "forget", "--store", str(folder), *arguments])


def test_the_command_forgets_documents(tmp_path: Path) -> None:
    with open_engine(tmp_path / "kv") as engine, open_engine(tmp_path / "kv", secret="hush") as keyed:
        engine.ensure(PASSAGES[:2], document="one")
        engine.ensure(PASSAGES[1:3], document="two")
        keyed.ensure(PASSAGES[3:4], document="one")
    done = forget(tmp_path / "kv", "--document", "one", "--tenant", "acme")
    assert done.exit_code == 0 and done.stdout.startswith("removed 0 chunks")
    done = forget(tmp_path / "kv", "--document", "one")
    assert done.exit_code == 0 and done.stdout.startswith("removed 1 chunks") and done.stdout.endswith("0 are left\n")
    assert not traces(tmp_path / "kv", PASSAGES[0]) and traces(tmp_path / "kv", PASSAGES[1])
    (tmp_path / "secret").write_text("hush\n")
    done = forget(tmp_path / "kv", "--document", "one", "--secret-file", str(tmp_path / "secret"))
    assert done.stdout.startswith("removed 1 chunks") and not traces(tmp_path / "kv", PASSAGES[3])
    assert forget(tmp_path / "kv", "--document", "one", "--containing", "x").exit_code == 2
    Administration(tmp_path / "kv").clear()
    assert list((tmp_path / "kv" / "documents").iterdir()) == []


def test_what_a_document_takes_up_is_told(tmp_path: Path) -> None:
    with open_engine(tmp_path) as engine, open_engine(tmp_path, tenant="acme") as acme:
        engine.ensure(PASSAGES[:3], document="one")
        engine.ensure(PASSAGES[2:4], document="two")
        acme.ensure(PASSAGES[:1], document="one")
        sizes = {entry.text: entry.nbytes for entry in engine.library.store.entries()}
    folder = Administration(tmp_path)
    (one,) = folder.usage_of_documents(["one"])
    assert (one.entries, one.nbytes) == (3, sum(sizes[text] for text in PASSAGES[:3])) and one.bytes_per_token
    assert [usage.entries for usage in folder.usage_of_documents(["one", "two"])] == [4]
    assert [usage.entries for usage in folder.usage_of_documents(["one"], "acme")] == [1]
    assert folder.usage_of_documents(["three"]) == []
    told = CliRunner().invoke(cli.app, ["store", "stats", "--store", str(tmp_path), "--document", "two"])
    assert told.exit_code == 0 and "2 chunks" in told.stdout
