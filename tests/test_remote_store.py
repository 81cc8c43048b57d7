"""A remote tier: what is kept there is served from there, and a remote that is dead or wrong costs little."""

from __future__ import annotations

import asyncio
import http.server
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from stores import HOLES, HUGE, KEYED, MODEL, make, same, sparse, whole_reads
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine
from cacheclip_rag.chunks import Namespace
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.store import DiskStore, MemoryStore, Remote, RemoteStore, TieredStore, format
from cacheclip_rag.store import remote as module
from cacheclip_rag.store.remote import CALLS_AT_ONCE

pytest.importorskip("fsspec")

BUCKET = "cacheclip"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, on loopback."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    name = uuid.uuid4().hex
    if request.param == "memory":
        return Remote(f"memory://{name}", timeout=60)
    if request.param == "file":
        return Remote(f"file://{tmp_path}/share", timeout=60)
    options = dict(key="k", secret="s", endpoint_url=request.getfixturevalue("s3"))
    remote = Remote(f"s3://{BUCKET}-{name}/folder", timeout=60, **options)
    remote.fs.mkdir(f"{BUCKET}-{name}")
    return remote


def uploaded(remote: Remote, text: str = "text 0", namespace: Namespace = MODEL) -> str:
    store = RemoteStore(remote, namespace)
    key = namespace.key(text)
    assert store.put(key, make(text)) is False and store.get(namespace.key("absent")) is None
    store.flush()
    assert key in store and store.stats().entries == 1
    return key


def test_another_machine_gets_what_one_put(remote: Remote, tmp_path: Path) -> None:
    key = uploaded(remote)
    local = DiskStore(tmp_path / "elsewhere", MODEL, HUGE, sync=False)
    tiers = TieredStore(MemoryStore(HUGE), local, remote=RemoteStore(remote, MODEL))
    assert same(tiers.get(key), make("text 0"))
    assert key in local, "and keeps a copy"
    assert tiers.get(MODEL.key("absent")) is None
    assert tiers.stats().entries == 1


def test_the_bytes_are_the_disk_s(remote: Remote, tmp_path: Path) -> None:
    key = uploaded(remote)
    data = remote.read(f"{MODEL.digest[:32]}/{key}.safetensors")
    assert same(format.load(data, key, MODEL), make("text 0"))


def test_what_is_deleted_is_gone_there_too(remote: Remote) -> None:
    key = uploaded(remote)
    store = RemoteStore(remote, MODEL)
    store.delete([key, "../../etc"])
    assert store.get(key) is None and RemoteStore(remote, MODEL).get(key) is None
    store.put(key, make("text 0"))
    store.flush()
    assert same(RemoteStore(remote, MODEL).get(key), make("text 0"))


def test_tenants_and_secrets_are_apart_there_too(remote: Remote) -> None:
    key = uploaded(remote)
    assert same(RemoteStore(remote, MODEL).get(key), make("text 0"))
    for namespace in (Namespace({**MODEL.fields, "tenant": "b"}), KEYED):
        store = RemoteStore(remote, namespace)
        assert store.get(key) is None and store.get(namespace.key("text 0")) is None


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_what_is_damaged_there_is_a_miss_and_written_again(remote: Remote, damage: str) -> None:
    key = uploaded(remote)
    path = f"{remote.root}/{MODEL.digest[:32]}/{key}.safetensors"
    good = remote.fs.cat_file(path)
    bad = {
        "cut": good[:-1],
        "flipped": good[:-1] + bytes([good[-1] ^ 1]),
        "empty": b"",
        "another's": format.dump(MODEL.key("text 1"), make("text 1"), MODEL),
    }[damage]
    remote.fs.pipe_file(path, bad)
    store = RemoteStore(remote, MODEL)
    assert store.get(key) is None and sum(store.stats().rejected.values()) == 1
    store.put(key, make("text 0"))
    store.flush()
    assert same(RemoteStore(remote, MODEL).get(key), make("text 0"))


class Broken:
    """A file system that does what it is told: fail, at once or after 0.2 s, hang until it is let go, or answer."""

    protocol = "broken"

    def __init__(self) -> None:
        self.calls, self.how, self.free = 0, "fail", threading.Event()

    def __getattr__(self, name: str) -> Any:
        def call(*_: object, **__: object) -> bytes:
            self.calls += name != "info"
            if self.how == "hang":
                self.free.wait(60)
            if self.how == "well":
                raise FileNotFoundError
            if self.how == "slow" and name != "info":
                time.sleep(0.2)
            raise ConnectionError("no route to host")

        return call


@pytest.fixture
def broken() -> Iterator[Remote]:
    remote = Remote("memory://broken", timeout=0.3, pause=30)
    remote.fs = Broken()
    yield remote
    remote.fs.free.set()


def test_a_remote_that_fails_is_not_asked_for_a_while(broken: Remote, tmp_path: Path) -> None:
    local = DiskStore(tmp_path, MODEL, HUGE, sync=False)
    tiers = TieredStore(MemoryStore(HUGE), local, remote=RemoteStore(broken, MODEL))
    for number in range(50):
        assert tiers.get(MODEL.key(f"text {number}")) is None
    assert broken.broken and broken.fs.calls == 3
    assert tiers.put(MODEL.key("text 0"), make("text 0")) is True, "the local tiers go on"
    assert same(tiers.get(MODEL.key("text 0")), make("text 0"))
    assert tiers.remote is not None
    tiers.remote.flush()  # type: ignore[attr-defined]
    tiers.delete([MODEL.key("text 0")])
    assert tiers.get(MODEL.key("text 0")) is None and broken.fs.calls == 3


def test_a_remote_that_hangs_costs_a_bounded_delay(broken: Remote) -> None:
    broken.fs.how = "hang"
    store = RemoteStore(broken, MODEL)
    start = time.monotonic()
    for number in range(100):
        assert store.get(MODEL.key(f"text {number}")) is None
    assert time.monotonic() - start < 5 and broken.fs.calls == 1
    store.put(MODEL.key("x"), make("x"))
    store.flush()
    assert store.stats().failed_puts == 1 and time.monotonic() - start < 10


def test_many_threads_wait_no_longer_than_one(broken: Remote) -> None:
    broken.fs.how = "hang"
    store = RemoteStore(broken, MODEL)
    start = time.monotonic()
    threads = [threading.Thread(target=store.get, args=(MODEL.key(f"text {n}"),)) for n in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start < 10 and broken.fs.calls <= CALLS_AT_ONCE


def test_a_remote_that_comes_back_is_asked_again(broken: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pause that doubles, up to ten minutes, until an answer comes; then it begins with the shortest again."""
    now, store = [0.0], RemoteStore(broken, MODEL)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def calls_after(seconds: float) -> int:
        now[0] += seconds
        before = broken.fs.calls
        for number in range(5):
            store.get(MODEL.key(f"text {number}"))
        return int(broken.fs.calls - before)

    assert calls_after(0) == 3 and broken.broken
    for pause in (30, 60, 120, 240, 480, 600, 600):
        assert (calls_after(pause - 1), calls_after(1)) == (0, 1) and broken.broken
    broken.fs.how = "well"
    assert (calls_after(599), calls_after(1)) == (0, 5) and not broken.broken
    broken.fs.how = "fail"
    assert (calls_after(0), calls_after(29), calls_after(1)) == (3, 0, 1)


def test_a_remote_that_is_slow_and_fails_is_given_up_as_soon_as_one_that_hangs(broken: Remote) -> None:
    store, broken.fs.how = RemoteStore(broken, MODEL), "slow"
    store.get(MODEL.key("text 0"))
    assert not broken.broken
    store.get(MODEL.key("text 1"))
    assert broken.broken


def test_a_file_that_is_too_large_is_not_fetched() -> None:
    remote = Remote(f"memory://{uuid.uuid4().hex}", max_bytes=1000)
    key = uploaded(remote)
    assert RemoteStore(remote, MODEL).get(key) is None


def test_an_upload_that_was_forgotten_meanwhile_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(f"memory://{uuid.uuid4().hex}", timeout=60)
    store, key = RemoteStore(remote, MODEL), MODEL.key("text 0")
    started, go_on, pipe = threading.Event(), threading.Event(), remote.fs.pipe_file

    def slow(path: str, data: bytes) -> None:
        started.set()
        go_on.wait(60)
        pipe(path, data)

    monkeypatch.setattr(remote.fs, "pipe_file", slow)
    store.put(key, make("text 0"))
    assert started.wait(60)
    store.delete([key])
    go_on.set()
    store.flush()
    assert key not in store and RemoteStore(remote, MODEL).get(key) is None


def test_what_cannot_be_a_remote_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Remote("no-such-protocol://somewhere")


def test_an_engine_takes_from_a_remote_what_another_one_encoded(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, prompt = tiny_backbone(), f"{PASSAGES[0]}\n\n{PASSAGES[1]}\n\nWho built it?"
    with Engine(backbone, store=tmp_path / "one", remote=remote, tenant="a", secret="s") as one:
        one.ensure(PASSAGES[:2])
        first = one.generate(prompt, max_new_tokens=4)
    with Engine(backbone, store=tmp_path / "two", remote=remote, tenant="a", secret="s") as two:
        with monkeypatch.context() as patch:
            patch.setattr(two.library, "encode_each", None)
            assert len(two.ensure(PASSAGES[:2]).keys) == 2
        second = two.generate(prompt, max_new_tokens=4)
    assert second.ids == first.ids and second.report.reused == first.report.reused > 0
    with Engine(backbone, store=tmp_path / "three", remote=remote, tenant="b", secret="s") as three:
        assert three.library.get(three.library.key(PASSAGES[0])) is None, "another tenant"
    with Engine(backbone, store=tmp_path / "four", remote=remote, tenant="a") as four:
        assert four.library.get(four.library.key(PASSAGES[0])) is None, "without the secret"
    with Engine(backbone, remote=remote, tenant="a", secret="s") as five:
        assert five.library.get(five.library.key(PASSAGES[0])) is not None, "without a disk"


def test_an_engine_answers_although_its_remote_is_dead(broken: Remote, tmp_path: Path) -> None:
    broken.fs.how = "hang"
    with Engine(tiny_backbone(), store=tmp_path, remote=broken) as engine:
        start = time.monotonic()
        assert len(engine.ensure(PASSAGES[:2]).keys) == 2
        answer = engine.generate(f"{PASSAGES[0]}\n\nWho built it?", max_new_tokens=4)
        assert len(answer.ids) == 4 and not answer.report.fallbacks
        engine.forget(PASSAGES[:1])
        assert not engine.knows(PASSAGES[0])
        assert time.monotonic() - start < 30


# ---- what is sent ------------------------------------------------------------------------------------------------


class Endless(http.server.BaseHTTPRequestHandler):
    """Ignores the range it is asked for, says of every file that it is small, and sends until nobody listens."""

    sent, piece, ended = 0, b"\0" * (1 << 20), threading.Event()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while type(self).sent < 1 << 30:
                self.wfile.write(self.piece)
                type(self).sent += len(self.piece)
                time.sleep(0 if len(self.piece) > 1 else 0.01)
        except OSError:
            self.ended.set()


@pytest.fixture
def endless() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    Endless.sent, Endless.piece, Endless.ended = 0, b"\0" * (1 << 20), threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/kv"
    server.shutdown()


def test_a_server_that_ignores_ranges_is_not_listened_to_for_longer_than_is_kept(endless: str) -> None:
    remote = Remote(endless, timeout=60, max_bytes=1 << 20)
    assert remote.read_head("x", 100) == bytes(100)
    with pytest.raises(module.Unavailable, match="larger than 1,048,576 bytes"):
        remote.read("x")
    assert RemoteStore(remote, MODEL).get(MODEL.key("text 0")) is None
    assert Endless.ended.wait(60) and Endless.sent < 256 << 20, "what lies in the sockets' buffers"


def test_a_server_that_never_ends_is_not_listened_to_after_its_time(endless: str) -> None:
    Endless.piece = b"\0"
    for work in (lambda remote: remote.read("x"), lambda remote: remote.listing()):
        Endless.ended.clear()
        with pytest.raises(module.Unavailable):
            work(Remote(endless, timeout=0.5))
        assert Endless.ended.wait(60), "the connection is closed"


@pytest.mark.parametrize("raised", [asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit])
def test_whatever_a_client_raises_is_a_miss(broken: Remote, raised: type[BaseException]) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise raised("from the client")

    broken.fs.cat_file = broken.fs.find = broken.fs.info = fail
    store = RemoteStore(broken, MODEL)
    assert store.get(MODEL.key("text 0")) is None and store.stats().rejected == {"unavailable": 1}
    with pytest.raises(module.Unavailable, match=raised.__name__):
        broken.listing()


def test_an_interrupt_of_who_waits_does_not_keep_others_out(broken: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        RemoteStore(broken, MODEL).get(MODEL.key(f"text {number}"))
    assert broken.broken
    broken._until, broken.fs.how = 0.0, "well"  # the pause is over, and the next call tries
    with monkeypatch.context() as patch:
        patch.setattr(module.Future, "result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            broken.read_head("x", 1)
    broken._until = 0.0
    with pytest.raises(FileNotFoundError):
        broken.read_head("x", 1)
    assert not broken.broken


def test_a_file_with_holes_on_a_share_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Remote(f"file://{tmp_path}/share", timeout=60)
    key = uploaded(remote)
    path = tmp_path / "share" / MODEL.digest[:32] / f"{key}.safetensors"
    sparse(path, path.read_bytes())
    sizes = whole_reads(monkeypatch)
    store = RemoteStore(remote, MODEL)
    assert store.get(key) is None and store.stats().rejected == {"larger than its header says": 1}
    assert max(sizes, default=0) < HOLES and not remote.broken
    store.put(key, make("text 0"))
    store.flush()
    assert same(RemoteStore(remote, MODEL).get(key), make("text 0"))


def test_folders_above_a_share_are_their_owner_s(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        uploaded(Remote(f"file://{tmp_path}/one/two", timeout=60))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "one").rglob("*") if path.is_dir()} == {0o700}
