"""Forgotten text does not come back: not from look-ups, memory, set-aside files, links, remotes, nor by a race."""

from __future__ import annotations

import errno
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import HUGE, MODEL, OTHER, SIZE, age, holds, make, open_disk, path_of, put, same, total
from tiny import PASSAGES, prompt_of, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.errors import ConfigurationError, StoreError
from cacheclip_rag.frameworks import encode
from cacheclip_rag.store import (
    DiskStore,
    Documents,
    Int8Store,
    MemoryStore,
    Place,
    Remote,
    RemoteStore,
    TieredStore,
    files,
)
from cacheclip_rag.store.admin import Administration

SECRET = "a secret text"


def secret(text: str) -> bool:
    return "secret" in text


def tiers_over(folder: Path, memory: int = HUGE, **options: Any) -> TieredStore:
    return TieredStore(MemoryStore(memory), open_disk(folder), **options)


# ---- other processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "of", [lambda disk: disk, TieredStore, Int8Store, lambda disk: TieredStore(MemoryStore(1), disk)]
)
def test_a_look_up_that_finds_a_file_gone_says_so(tmp_path: Path, of: Callable[[DiskStore], Any]) -> None:
    store = of(open_disk(tmp_path))
    key = put(open_disk(tmp_path), SECRET)
    assert store.refresh() and key in store
    Administration(tmp_path).forget(secret)
    assert store.get(key) is None and key not in store
    store.refresh()
    assert store.vanished() == [key] and store.vanished() == []


def test_what_came_again_did_not_vanish(tmp_path: Path) -> None:
    store = tiers_over(tmp_path, memory=1)
    key = MODEL.key(SECRET)
    store.put(key, make(SECRET))
    Administration(tmp_path).forget(secret)
    assert store.get(key) is None
    store.put(key, make(SECRET))
    store.refresh()
    assert store.vanished() == [] and same(store.get(key), make(SECRET))


def test_what_this_process_evicted_or_deleted_did_not_vanish(tmp_path: Path) -> None:
    store = open_disk(tmp_path, cap=3 * SIZE + 300)
    keys = [put(store, f"text {number}") for number in range(5)]
    store.delete([keys[-1]])
    assert all(store.get(key) is None for key in (keys[0], keys[-1]))
    store.refresh()
    assert store.vanished() == []


def test_a_copy_that_no_file_is_of_goes_when_others_forget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tiers_over(tmp_path)
    stays = put(open_disk(tmp_path), "something else")
    store.refresh(), store.get(stays)
    with monkeypatch.context() as patch:
        patch.setattr(files, "reserve", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
        store.put(MODEL.key(SECRET), make(SECRET))
    assert same(store.get(MODEL.key(SECRET)), make(SECRET)), "from memory"
    assert not store.refresh()
    Administration(tmp_path).forget(secret)  # which finds nothing to remove
    assert store.refresh()
    assert store.get(MODEL.key(SECRET)) is None and store.vanished() == [MODEL.key(SECRET)]
    assert stays in store.tiers[0] and not store.refresh()


def test_a_place_refreshes_all_its_stores(tmp_path: Path) -> None:
    place = Place(tmp_path, HUGE, HUGE)
    stores = [place.store(namespace) for namespace in (MODEL, OTHER)]
    for store, namespace in zip(stores, (MODEL, OTHER), strict=True):
        store.put(namespace.key(SECRET), make(SECRET))
    assert place.refresh() is False
    Administration(tmp_path).forget(secret)
    assert place.refresh() is True and place.refresh() is False
    assert all(store.stats().memory_bytes == 0 for store in stores)
    assert [store.vanished() for store in stores] == [[MODEL.key(SECRET)], [OTHER.key(SECRET)]]


def test_a_look_up_under_way_does_not_bring_back_what_another_process_removed(tmp_path: Path) -> None:
    far = open_disk(tmp_path)
    store = TieredStore(MemoryStore(HUGE), far)
    key = put(far, SECRET)
    get = far.get

    def slow(wanted: str) -> Any:
        chunk = get(wanted)
        Administration(tmp_path).forget(secret)
        store.refresh()
        return chunk

    far.get = slow  # type: ignore[method-assign]
    assert store.get(key) is None and store.stats().memory_bytes == 0


def test_forgettings_are_told_on_a_full_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path)
    put(store, SECRET)
    Administration(tmp_path).forget(lambda _: False)
    seen = store.forgettings()
    monkeypatch.setattr(files, "publish", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    Administration(tmp_path).forget(secret)
    assert store.forgettings() != seen and not holds(tmp_path, SECRET)


class Process:
    """What an engine's process does with its texts: looks them up, and makes again in the background what is missing.

    Objects share nothing but the folder, so threads stand for processes.
    """

    def __init__(self, folder: Path, texts: list[str]) -> None:
        self.place = Place(folder, 4 * SIZE, HUGE)
        self.store = self.place.store(MODEL)
        self.known = set(texts)

    def follow(self) -> None:
        forgotten = self.place.refresh()
        gone = set(self.store.vanished())
        held = {text for text in self.known if MODEL.key(text) in self.store}
        self.known = {text for text in self.known if text in held or not (forgotten or MODEL.key(text) in gone)}

    def ask(self, text: str) -> None:
        self.follow()
        if text not in self.known or self.store.get(MODEL.key(text)) is not None:
            return
        before = self.place.forgettings()
        self.follow()
        if text in self.known:
            self.store.put(MODEL.key(text), make(text))
            if self.place.forgettings() != before:
                self.store.delete([MODEL.key(text)])


def test_nothing_comes_back_in_a_race(tmp_path: Path) -> None:
    texts = [f"text {number} is one of many" for number in range(150)]
    first = open_disk(tmp_path)
    for text in texts:
        put(first, text)
    done = threading.Event()

    def work(seed: int) -> None:
        process, order = Process(tmp_path, texts), random.Random(seed)
        while not done.is_set():
            process.ask(order.choice(texts))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    forgotten = [text for number, text in enumerate(texts) if number % 10]
    damage = random.Random(0)
    for text in forgotten:
        if damage.random() < 0.2:  # set aside by whoever reads it, or evicted by somebody: known without a file
            path_of(first, MODEL.key(text)).write_bytes(b"damaged")
        elif damage.random() < 0.2:
            path_of(first, MODEL.key(text)).unlink(missing_ok=True)
        Administration(tmp_path).forget({text}.__contains__)
    done.set()
    for thread in threads:
        thread.join()
    left = {stored.text for stored in Administration(tmp_path).entries()}
    assert not left & set(forgotten)
    assert not any(text.encode() in path.read_bytes() for path in tmp_path.rglob("*.bad") for text in forgotten)


def test_what_is_stored_while_it_is_forgotten_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the moment between the first look and the second note, which a race rarely hits."""
    store, scan, looks = open_disk(tmp_path), Administration.scan, list[int]()

    def meanwhile(self: Administration, namespace: str = "") -> Any:
        found = scan(self, namespace)
        looks.append(len(found))
        if len(looks) == 1:
            put(store, SECRET)
        return found

    monkeypatch.setattr(Administration, "scan", meanwhile)
    Administration(tmp_path).forget(secret)
    assert looks == [0, 1] and not holds(tmp_path, SECRET)


# ---- everything, or what is left ---------------------------------------------------------------------------------


def test_a_variant_that_was_set_aside_is_forgotten(tmp_path: Path) -> None:
    with Engine(tiny_backbone(), method="auto", store=tmp_path) as engine:
        engine.ensure(PASSAGES[:3], document="one")
        engine.fuse({PASSAGES[1]: [PASSAGES[0]]})
        (variant,) = [entry.key for entry in engine.library.store.entries() if entry.context]
        for key in (variant, engine.library.key(PASSAGES[0])):
            (path,) = tmp_path.glob(f"*/{key}.safetensors")
            path.write_bytes(path.read_bytes()[:-1])
            assert DiskStore(tmp_path, engine.library.namespace, HUGE).get(key) is None
        assert len(list(tmp_path.glob("*/*.bad"))) == 2
        engine.library.store.refresh()
        engine.forget(PASSAGES[:1])
        assert not holds(tmp_path, PASSAGES[0]) and holds(tmp_path, PASSAGES[1])


def refusing(function: str, refused: Callable[[Path], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(files, function)

    def refuse(path: Path | str, *rest: Any) -> Any:
        if refused(Path(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *rest)

    monkeypatch.setattr(files, function, refuse)


@pytest.mark.parametrize("function", ["remove", "read_head", "listing"])
@pytest.mark.parametrize("work", ["forget", "clear"])
def test_what_is_left_is_said_after_all_the_rest_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, work: str
) -> None:
    if (function, work) == ("read_head", "clear"):
        pytest.skip("clearing reads nothing")
    stores = [open_disk(tmp_path, namespace) for namespace in (MODEL, OTHER)]
    keys = [put(store, f"{SECRET} {number}") for store in stores for number in range(3)]
    stuck = stores[0].path if function == "listing" else path_of(stores[0], keys[1])
    place = Administration(tmp_path)
    with monkeypatch.context() as patch:
        refusing(function, lambda path: path == stuck, patch)
        with pytest.raises(StoreError, match=f"removed(?s:.*){stuck.name}"):
            place.forget(secret) if work == "forget" else place.clear()
    left = [path.name for path in tmp_path.glob("*/*.safetensors")]
    assert len(left) == (3 if function == "listing" else 1)
    place.forget(secret) if work == "forget" else place.clear()
    assert not holds(tmp_path, SECRET)


def test_a_document_stays_known_while_anything_of_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_disk(tmp_path)
    Documents(tmp_path).add("one", [SECRET])
    put(store, SECRET)
    with monkeypatch.context() as patch:
        refusing("remove", lambda path: path.suffix == ".safetensors", patch)
        with pytest.raises(StoreError):
            Administration(tmp_path).forget_documents(["one"])
    assert Documents(tmp_path).of("one")
    gone, left = Administration(tmp_path).forget_documents(["one"])
    assert len(gone) == 1 and left == 0 and not Documents(tmp_path).of("one")


def moved(store: DiskStore, elsewhere: Path) -> None:
    """To a larger disk, say."""
    store.path.rename(elsewhere)
    store.path.symlink_to(elsewhere)


def test_a_namespace_behind_a_link_is_one_like_others(tmp_path: Path) -> None:
    folder, elsewhere, cap = tmp_path / "kv", tmp_path / "larger disk", 4 * SIZE + 400
    put(open_disk(folder), SECRET)
    moved(open_disk(folder), elsewhere)
    store = open_disk(folder, cap=cap)
    assert same(store.get(MODEL.key(SECRET)), make(SECRET))
    for number in range(9):
        put(store, f"text {number}")
        assert total(elsewhere) <= cap
    put(store, SECRET)
    assert Administration(folder).verify().good == len(list(elsewhere.glob("*.safetensors")))
    count = len(list(elsewhere.glob("*.safetensors")))
    assert [one.entries for one in Administration(folder).usage()] == [count]
    assert len(Administration(folder).forget(secret)) == 1
    assert not holds(elsewhere, SECRET) and Administration(folder).clear() == count - 1


def test_a_link_that_leads_nowhere_is_not_said_to_be_forgotten(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "kv", tmp_path / "larger disk"
    put(open_disk(folder), SECRET)
    moved(open_disk(folder), elsewhere)
    elsewhere.rename(tmp_path / "not mounted")
    with pytest.raises(StoreError, match="link that leads to no folder"):
        Administration(folder).forget(secret)
    Administration(folder).forget(secret, namespace=OTHER.digest[:32])


@pytest.mark.parametrize("name", ["{key}.safetensors", "{key}.bad", ".tmp-1-2"])
def test_a_link_to_a_file_is_not_said_to_be_forgotten(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "kv"
    store = open_disk(folder)
    key = put(store, SECRET)
    path_of(store, key).rename(tmp_path / "elsewhere")
    (store.path / name.format(key=key)).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link"):
        Administration(folder).forget(secret)


# ---- the remote --------------------------------------------------------------------------------------------------


@pytest.fixture
def remote() -> Remote:
    pytest.importorskip("fsspec")
    return Remote(f"memory://{uuid.uuid4().hex}", timeout=60)


@pytest.mark.parametrize("noticed", [False, True])
def test_an_upload_does_not_bring_back_what_another_process_forgot(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch, noticed: bool
) -> None:
    waiting, go_on, write = threading.Event(), threading.Event(), remote.write

    def slow(*arguments: Any, **options: Any) -> None:
        waiting.set()
        assert go_on.wait(60)
        write(*arguments, **options)

    monkeypatch.setattr(remote, "write", slow)
    place = Place(tmp_path, HUGE, HUGE, remote=remote)
    store = place.store(MODEL)
    for text in (SECRET, "another secret text", "something else"):
        store.put(MODEL.key(text), make(text))
    assert waiting.wait(60)
    Administration(tmp_path).forget(secret)
    if noticed:
        store.refresh()
    go_on.set()
    place.settle()
    assert set(remote.listing()) == {f"{MODEL.digest[:32]}/{MODEL.key('something else')}.safetensors"}


def test_what_was_uploaded_is_not_known_any_more_once_it_is_forgotten(tmp_path: Path, remote: Remote) -> None:
    store = Place(tmp_path, HUGE, HUGE, remote=remote).store(MODEL)
    store.put(MODEL.key(SECRET), make(SECRET))
    assert isinstance(store, TieredStore) and isinstance(store.remote, RemoteStore)
    store.remote.flush()
    assert MODEL.key(SECRET) in store.remote
    Administration(tmp_path).forget(secret)
    store.refresh()
    assert MODEL.key(SECRET) not in store


def test_what_is_forgotten_while_it_is_fetched_is_not_kept(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = RemoteStore(remote, MODEL)
    far.put(MODEL.key(SECRET), make(SECRET))
    far.flush()
    store = Place(tmp_path, HUGE, HUGE, remote=remote).store(MODEL)
    read = remote.read

    def meanwhile(*arguments: Any) -> Any:
        data = read(*arguments)
        Administration(tmp_path).forget(secret)
        return data

    monkeypatch.setattr(remote, "read", meanwhile)
    assert store.get(MODEL.key(SECRET)) is None and not holds(tmp_path, SECRET)
    monkeypatch.undo()
    assert same(store.get(MODEL.key(SECRET)), make(SECRET))


def test_what_came_back_from_a_remote_that_was_away_goes_with_it(
    tmp_path: Path, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = (Place(tmp_path, HUGE, HUGE, remote=remote) for _ in range(2))
    store = place.store(MODEL)
    store.put(MODEL.key(SECRET), make(SECRET))
    place.settle()
    with monkeypatch.context() as patch:
        patch.setattr(remote.fs, "find", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
        place.forget_elsewhere([place.documents.text(SECRET)])
    assert other.store(MODEL).get(MODEL.key(SECRET)) is not None and holds(tmp_path, SECRET)
    place.settle()
    assert not holds(tmp_path, SECRET) and remote.listing() == {}


# ---- whose ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tenant", [None, 7, b"acme", ["acme"]])
def test_a_tenant_is_a_text(tmp_path: Path, tenant: Any) -> None:
    for work in (
        lambda: Place(tmp_path, HUGE, HUGE, tenant),
        lambda: Documents(tmp_path, tenant),
        lambda: Administration(tmp_path).forget_documents(["one"], tenant),
        lambda: Engine(tiny_backbone(), tenant=tenant),
    ):
        with pytest.raises(ConfigurationError, match="tenant"):
            work()


@pytest.mark.parametrize("wrong", [7, ["k"], bytearray(b"k")])
def test_a_secret_is_bytes(tmp_path: Path, wrong: Any) -> None:
    for work in (lambda: Place(tmp_path, HUGE, HUGE, "", wrong), lambda: Documents(tmp_path, "", wrong)):
        with pytest.raises(ConfigurationError, match="secret"):
            work()


@pytest.mark.parametrize("cap", ["8GiB", None, -1, float("nan"), True])
def test_a_cap_is_a_number_of_bytes(tmp_path: Path, cap: Any) -> None:
    with pytest.raises(ConfigurationError, match="memory_bytes"):
        Place(tmp_path, cap, HUGE)
    with pytest.raises(ConfigurationError, match="disk_bytes"):
        Place(tmp_path, HUGE, cap)


@pytest.mark.parametrize("name", [None, 7, b"one"])
def test_a_document_s_name_is_a_text(tmp_path: Path, name: Any) -> None:
    documents = Documents(tmp_path)
    for work in (
        lambda: documents.add(name, ["text"]),
        lambda: documents.only([name]),
        lambda: documents.of(name),
        lambda: documents.remove([name]),
    ):
        with pytest.raises(ConfigurationError, match="document"):
            work()
    with pytest.raises(ConfigurationError, match="several"):
        documents.only("one")


def test_a_file_of_a_tenant_that_was_no_text_is_left_to_itself(tmp_path: Path) -> None:
    """Earlier versions took any tenant; what they stored is forgotten by its text."""
    odd = replace(MODEL, fields={**MODEL.fields, "tenant": None})
    store = open_disk(tmp_path, odd)
    age(path_of(store, put(store, SECRET)), 10)
    place = Place(tmp_path, HUGE, HUGE)
    place.forget_everywhere([place.documents.text(SECRET)])
    assert holds(tmp_path, SECRET)
    assert len(Administration(tmp_path).forget(secret)) == 1 and not holds(tmp_path, SECRET)


def test_no_text_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even its beginning, at any level: logs are kept, and kept elsewhere."""
    caplog.set_level(logging.DEBUG, "cacheclip_rag")
    texts = [f"The patient {number} is called Jane Roe. " + PASSAGES[number] for number in range(4)]
    with Engine(tiny_backbone(), store=tmp_path, disk_bytes=2000, memory_bytes=10) as small:
        encode(small, [*texts, "Jane Roe", "Jane Roe \ud800 " + PASSAGES[0]], show_progress=False)
        small.generate("\n\n".join(texts), max_new_tokens=1)
        small.ensure_later(texts)
        small.flush()
    with Engine(tiny_backbone(), store=tmp_path) as engine:
        encode(engine, texts, show_progress=False)
        for path in tmp_path.glob("*/*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])
        engine.generate("\n\n".join(texts), max_new_tokens=1)
        engine.forget(texts)
    assert caplog.records and "not be kept" in caplog.text
    assert "Jane Roe" not in caplog.text and "patient" not in caplog.text


# ---- forgotten between the reading of a prompt and its prefill -------------------------------------------------


def forgetting_after_reading(monkeypatch: pytest.MonkeyPatch, ready: Engine, text: str) -> None:
    read = ready.prefiller.read

    def then_forget(*arguments: Any) -> Any:
        done = read(*arguments)
        ready.forget([text])
        return done

    monkeypatch.setattr(ready.prefiller, "read", then_forget)


@pytest.mark.parametrize("method", ["auto", "prefix-cache", "cachecraft"])
def test_what_is_forgotten_once_its_prompt_was_read_leaves_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Engine(tiny_backbone(), method=method)
    ready.ensure(PASSAGES[:3])
    prompt = prompt_of(ready, PASSAGES[:2])
    with monkeypatch.context() as patch:
        forgetting_after_reading(patch, ready, PASSAGES[0])
        ready.prefill(prompt)
    assert ready.usage.uses(ready.library.key(PASSAGES[0])) == 0
    if method == "auto":  # a token is a character here
        stored = ready.library.get(ready.library.key(PASSAGES[1]))
        assert stored is not None
        kept = ready.stats().memory.get("preambles", 0) / (stored.keys[:, :, :1].nbytes * 2)
        assert kept <= prompt.index(PASSAGES[0])
    if method == "prefix-cache":
        assert "prefix caches" not in ready.stats().memory
    if method == "cachecraft":
        assert not ready.variants_of(method, PASSAGES[0]) and not ready.variants_of(method, PASSAGES[1])


def test_what_waits_to_be_known_is_dropped_when_it_is_forgotten() -> None:
    """For a method that encodes nothing ahead, too."""
    ready = Engine(tiny_backbone(), method="cachecraft")
    stream = ready.stream(prompt_of(ready, PASSAGES[:1]), max_new_tokens=200, min_new_tokens=200)
    next(stream)
    reader = threading.Thread(target=lambda: [time.sleep(0.01) for _ in stream])
    reader.start()
    ready.ensure_later([PASSAGES[2]])
    while not ready.corpus.background.busy:
        time.sleep(0.001)
    ready.forget([PASSAGES[2]])
    stream.close()
    reader.join()
    ready.flush()
    assert not ready.knows(PASSAGES[2])
    ready.close()
