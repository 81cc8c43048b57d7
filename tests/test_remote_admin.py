"""What only a remote holds: a fresh process lists it, verifies it, and forgets it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import MODEL
from test_remote_store import remote as remote  # the fixtures: memory, a shared folder, S3
from test_remote_store import s3 as s3
from test_remote_store import uploaded
from tiny import PASSAGES, tiny_backbone
from typer.testing import CliRunner

from cacheclip_rag import Engine, StoreError
from cacheclip_rag.chunks import Namespace
from cacheclip_rag.cli import main as cli
from cacheclip_rag.store import Documents, Remote, RemoteStore, format
from cacheclip_rag.store.remote_admin import RemoteAdministration, RemoteTexts

TENANT = Namespace({**MODEL.fields, "tenant": "b"})
BACKBONE = tiny_backbone()


def there(remote: Remote) -> list[tuple[str, str]]:
    """Tenant and text of all that lies at the remote, as somebody sees it who just came."""
    return sorted((one.tenant, one.text) for one in RemoteAdministration(remote).entries())


def name_of(key: str, namespace: Namespace = MODEL) -> str:
    return f"{namespace.digest[:32]}/{key}{format.SUFFIX}"


@pytest.fixture
def memory() -> Remote:
    return Remote(f"memory://{uuid.uuid4().hex}", timeout=60)


# ---- looking -----------------------------------------------------------------------------------------------------


def test_what_lies_there_is_listed(remote: Remote) -> None:
    assert there(remote) == [] and RemoteAdministration(remote).usage() == []
    keys = [uploaded(remote, f"text {number}") for number in range(3)]
    uploaded(remote, "text 0", TENANT)
    remote.write("notes/readme.txt", b"nobody's business", again=False)
    assert there(remote) == [("", "text 0"), ("", "text 1"), ("", "text 2"), ("b", "text 0")]
    listed = {one.key: one for one in RemoteAdministration(remote).entries(MODEL.digest[:8])}
    assert set(listed) == set(keys) and all(one.nbytes == len(remote.read(name_of(key))) for key, one in listed.items())
    usage = {one.name: one for one in RemoteAdministration(remote).usage()}
    assert usage[MODEL.digest[:32]].entries == 3 and usage[TENANT.digest[:32]].about["tenant"] == "b"
    assert all(one.used > 1e9 for one in usage.values())


def test_what_lies_there_is_verified(remote: Remote) -> None:
    good, bad, short = (uploaded(remote, f"text {number}") for number in range(3))
    whole = bytes(remote.read(name_of(bad)))
    remote.write(name_of(bad), whole[:-1] + bytes([whole[-1] ^ 1]), again=True)
    remote.write(name_of(short), whole[:30], again=True)
    result = RemoteAdministration(remote).verify()
    assert result.good == 1 and dict(result.bad) == {name_of(bad): "checksum", name_of(short): "truncated"}
    assert RemoteStore(remote, MODEL).get(good) is not None
    assert RemoteAdministration(remote).clear() == 3 and there(remote) == []


def test_a_remote_that_is_away_is_said_to_be(memory: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded(memory)
    place = RemoteAdministration(memory)
    for call in ("find", "cat_file"):
        with monkeypatch.context() as patch:
            patch.setattr(memory.fs, call, broken)
            patch.setattr(memory.fs, "info", broken)
            with pytest.raises(StoreError, match="no route"):
                list(place.entries())
            with pytest.raises(StoreError, match="no route"):
                place.forget(lambda text: True)
    assert len(there(memory)) == 1


# ---- forgetting --------------------------------------------------------------------------------------------------


def broken(*_: object, **__: object) -> Any:
    raise ConnectionError("no route to host")


def open_engine(folder: Path, remote: Remote, **options: Any) -> Engine:
    return Engine(BACKBONE, method="naive", store=folder, remote=remote, **options)


def left_alone_at(remote: Remote, folder: Path, **options: Any) -> None:
    """Two documents' chunks and a variant behind other chunks, at the remote only, with the notes of whose they are."""
    with open_engine(folder, remote, **options) as engine:
        engine.ensure(PASSAGES[:2], document="one")
        engine.ensure(PASSAGES[1:3], document="two")
        library = engine.library
        kv = replace(library.encode(PASSAGES[3]), context=(PASSAGES[0],))
        library.store.put(library.namespace.key(PASSAGES[3], kv.context), kv)
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def test_a_document_that_only_the_remote_holds_is_forgotten(remote: Remote, tmp_path: Path) -> None:
    left_alone_at(remote, tmp_path / "one")
    left_alone_at(remote, tmp_path / "acme", tenant="acme")
    assert len(there(remote)) == 8
    with open_engine(tmp_path / "one", remote) as engine:
        assert not engine.knows(PASSAGES[0])
        engine.forget_document("one")
        assert there(remote)[:2] == sorted(("", text) for text in PASSAGES[1:3]), "and what was in its context"
        assert len(there(remote)) == 6, "another tenant's"
        engine.forget_document("two")
    assert {tenant for tenant, _ in there(remote)} == {"acme"}
    assert not any(path.is_file() for path in (tmp_path / "one" / "documents").iterdir())


def test_a_text_that_only_the_remote_holds_is_forgotten(remote: Remote, tmp_path: Path) -> None:
    left_alone_at(remote, tmp_path / "one")
    with open_engine(tmp_path / "elsewhere", remote) as engine:
        engine.forget(PASSAGES[:1])
    assert there(remote) == sorted(("", text) for text in PASSAGES[1:3])


def test_a_document_stays_known_until_the_remote_has_forgotten_it(
    memory: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_alone_at(memory, tmp_path)
    with monkeypatch.context() as patch, open_engine(tmp_path, memory) as engine:
        patch.setattr(memory.fs, "find", broken)
        with pytest.raises(StoreError, match="no route"):
            engine.forget_document("one")
    later = Remote(memory.url)
    assert len(there(later)) == 4
    with open_engine(tmp_path, later) as engine:
        engine.forget_document("one")
    assert len(there(later)) == 2


def test_a_text_is_forgotten_when_the_remote_is_back(
    memory: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_alone_at(memory, tmp_path)
    memory = Remote(memory.url, pause=0.0)  # asked again at once
    with open_engine(tmp_path, memory) as engine:
        with monkeypatch.context() as patch:
            for call in ("find", "rm_file"):
                patch.setattr(memory.fs, call, broken)
            engine.forget(PASSAGES[:1])
            engine.flush()
        assert len(there(Remote(memory.url))) == 4
    assert len(there(memory)) == 2


def test_files_that_may_hold_it_and_do_not_say_so_go(memory: Remote) -> None:
    cut, newer, other = (uploaded(memory, f"text {number}") for number in range(3))
    memory.write(name_of(cut), memory.read(name_of(cut))[:40], again=True)
    data = memory.read(name_of(newer)).replace(b"cacheclip-rag/1", b"cacheclip-rag/2")
    memory.write(name_of(newer), data, again=True)
    RemoteTexts(memory, "", Documents(None).text).forget([Documents(None).text("text 7")])
    assert set(memory.listing()) == {name_of(newer), name_of(other)}


def test_each_beginning_is_read_once_and_other_tenants_not(memory: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        uploaded(memory, f"text {number}"), uploaded(memory, f"text {number}", TENANT)
    heads, read_head = list[str](), memory.read_head

    def counted(name: str, size: int) -> bytes:
        heads.append(name)
        return read_head(name, size)

    monkeypatch.setattr(memory, "read_head", counted)
    digest = Documents(None).text
    texts = RemoteTexts(memory, "", digest)
    texts.forget([digest("text 0")])
    assert len(heads) == 4 + 1
    texts.forget_in([MODEL.digest[:32]], [digest("text 1")])
    texts.forget_in(["0" * 32], [digest("text 2")])
    assert len(heads) == 4 + 1
    uploaded(memory, "text 0")
    heads.clear()
    texts.forget([digest("text 0")])
    assert len(heads) == 1
    monkeypatch.undo()
    assert there(memory) == [("", "text 2"), ("", "text 3"), *(("b", f"text {number}") for number in range(4))]


# ---- at the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def share(tmp_path: Path) -> Iterator[str]:
    url = f"file://{tmp_path}/share"
    left_alone_at(Remote(url, timeout=60), tmp_path / "kv")
    yield url
    shutil.rmtree(tmp_path / "share", ignore_errors=True)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(cli.app, ["store", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_the_commands_look_at_a_remote(share: str) -> None:
    (usage,) = run("stats", "--remote", share)
    assert usage["entries"] == 4 and usage["about"]["tenant"] == ""
    listed = run("list", "--remote", share, "--text")
    assert sorted(one["text"] for one in listed) == sorted(PASSAGES[:4])
    assert run("verify", "--remote", share)["good"] == 4
    assert run("forget", "--remote", share, "--containing", PASSAGES[2][:30])["left"] == 0
    assert len(run("list", "--remote", share)) == 3
    assert CliRunner().invoke(cli.app, ["store", "clear", "--remote", share, "--yes"]).exit_code == 0
    assert run("list", "--remote", share) == []


def test_a_document_is_forgotten_in_the_folder_and_at_the_remote(share: str, tmp_path: Path) -> None:
    forgotten = run("forget", "--document", "one", "--store", str(tmp_path / "kv"), "--remote", share)
    assert (forgotten["removed"], forgotten["left"]) == (2, 0)
    assert there(Remote(share)) == sorted(("", text) for text in PASSAGES[1:3])
