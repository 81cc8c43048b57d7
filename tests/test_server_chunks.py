"""Documents over HTTP: what a client asks for is what the engine does, and what it answers is what came of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from http_server import serving
from tiny import PASSAGES, two_layers

from cacheclip_rag import ConfigurationError, Engine, StoreError
from cacheclip_rag.errors import ServerError
from cacheclip_rag.server import chunks
from cacheclip_rag.server.app import app
from cacheclip_rag.server.client import AsyncChunkClient, ChunkClient
from cacheclip_rag.server.embedded import Engines
from cacheclip_rag.server.service import Added, ChunkStats, Replaced, Skipped, TenantRefused
from cacheclip_rag.store import DiskStore, files

BACKBONE = two_layers()
KEYS = {"red": "acme", "blue": "zenith"}


class Served:
    """A server of two tenants, and their engines."""

    def __init__(self, folder: Path) -> None:
        self.engines = Engines(lambda tenant: Engine(BACKBONE, store=folder, tenant=tenant, method="naive"), "naive")
        self.folder, self.url = folder, ""

    def client(self, key: str | None = "red") -> ChunkClient:
        return ChunkClient(self.url, key)

    def known(self, tenant: str = "acme") -> list[int]:
        return [number for number, text in enumerate(PASSAGES) if self.engines.of(tenant).knows(text)]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    made = Served(tmp_path)
    with serving(app(made.engines, "tiny", KEYS)) as made.url:
        yield made


def test_chunks_are_added_once(served: Served) -> None:
    texts = [PASSAGES[0], "short", PASSAGES[1], PASSAGES[0], "y" * 5000, "short"]
    with served.client() as client:
        first, again = client.add(texts), client.add(texts)
        assert (first.encoded, first.kept) == (2, 0) and (again.encoded, again.kept) == (0, 2)
        assert [one.index for one in first.skipped] == [one.index for one in again.skipped] == [1, 4]
        assert "under 64" in first.skipped[0].reason and "limit" in first.skipped[1].reason
        assert served.known() == [0, 1]
        stats = client.stats()
        assert stats.chunks == 2 and stats.bytes > 0
        assert client.add([]) == Added()


def test_chunks_are_fused_with_their_neighbours(served: Served) -> None:
    with served.client() as client:
        client.add(PASSAGES[:3])
        done = client.fuse({PASSAGES[1]: PASSAGES[:1], PASSAGES[2]: ["nobody has added this"]})
        assert done.encoded == 1 and [one.index for one in done.skipped] == [1]
        again = client.fuse({PASSAGES[1]: PASSAGES[:1]})
        assert (again.encoded, again.kept) == (0, 1)
        assert client.stats().fused == 1
        assert client.fuse() == Added()  # no prompts have come
        client.forget(PASSAGES[:1])
        assert client.stats().fused == 0


@pytest.mark.parametrize("document", ["handbook.md", "a/../b c?#%2F", "ä", "x" * 1024])
def test_a_document_is_replaced_and_deleted(served: Served, document: str) -> None:
    with served.client() as client:
        client.add(PASSAGES[:2], document=document)
        client.add(PASSAGES[4:], document="another")
        result = client.replace(document, PASSAGES[1:4])
        assert (result.encoded, result.kept, result.removed, result.skipped) == (2, 1, 1, [])
        assert served.known() == [1, 2, 3, 4]
        for _ in range(2):  # a client repeats what it has no answer to
            client.forget_document(document)
            assert served.known() == [4]


def test_texts_are_forgotten_whatever_document_they_are_of(served: Served) -> None:
    with served.client() as client:
        client.add(PASSAGES[:3], document="one")
        client.forget(PASSAGES[:1])
        headers = {"Authorization": "Bearer red"}
        httpx.request(
            "DELETE", f"{served.url}/chunks", json={"texts": PASSAGES[1:2]}, headers=headers
        ).raise_for_status()
        assert served.known() == [2]


def test_texts_that_leave_a_document_stay_where_another_has_them(served: Served) -> None:
    with served.client() as client:
        client.add(PASSAGES[:3], document="one")
        client.add(PASSAGES[1:2], document="two")
        for _ in range(2):  # it may be repeated
            client.forget(PASSAGES[:2], document="one")
            assert served.known() == [1, 2]
        client.forget_document("two")
        assert served.known() == [2]


def test_tenants_do_not_see_each_other_s_chunks(served: Served) -> None:
    with served.client("red") as red, served.client("blue") as blue:
        red.add(PASSAGES[:2], document="one")
        blue.add(PASSAGES[1:3], document="one")
        blue.replace("one", PASSAGES[2:3])
        assert (served.known("acme"), served.known("zenith")) == ([0, 1], [2])
        assert (red.stats().chunks, blue.stats().chunks) == (2, 1)
        blue.forget(PASSAGES)
        blue.forget_document("one")
        assert (served.known("acme"), served.known("zenith")) == ([0, 1], [])


@pytest.mark.parametrize(
    "body",
    [
        {"texts": PASSAGES, "tenant": "zenith"},
        {"texts": PASSAGES, "kv_transfer_params": {"cacheclip": {"tenant": "zenith"}}},
        {"texts": PASSAGES[0]},
        {"texts": [1]},
        {"texts": None},
        {"text": PASSAGES},
        {"texts": PASSAGES, "document": 7},
        {"texts": PASSAGES, "document": ""},
        {"texts": PASSAGES, "document": "x" * 1025},
        [PASSAGES],
        None,
    ],
)
def test_a_body_that_is_wrong_is_refused_and_changes_nothing(served: Served, body: Any) -> None:
    for method, path in (("POST", "chunks"), ("PUT", "documents/one"), ("POST", "chunks/forget"), ("DELETE", "chunks")):
        if path != "chunks" and isinstance(body, dict) and "document" in body:
            body = {**body, "tenant": ""}
        headers = {"Authorization": "Bearer red", "Content-Type": "application/json"}
        answer = httpx.request(method, f"{served.url}/{path}", content=json.dumps(body), headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error", answer.text
    assert served.known() == served.known("zenith") == []


@pytest.mark.parametrize(("method", "path"), [("PUT", "documents/"), ("DELETE", "documents/"), ("POST", "documents/a")])
def test_a_document_needs_a_name_and_a_verb(served: Served, method: str, path: str) -> None:
    answer = httpx.request(method, f"{served.url}/{path}", json={"texts": []}, headers={"Authorization": "Bearer red"})
    assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"]


def test_clients_say_what_the_server_said(served: Served) -> None:
    with pytest.raises(ServerError, match="API key") as caught:
        served.client(None).stats()
    assert caught.value.status == 401
    with pytest.raises(ServerError, match="did not answer") as caught:
        ChunkClient("http://127.0.0.1:9").stats()
    assert caught.value.status is None
    for document in ("", ".", ".."):
        with pytest.raises(ConfigurationError, match="id"):
            served.client().forget_document(document)
    for refused in (served.client().add, served.client().forget):
        with pytest.raises(ConfigurationError, match="several texts"):
            refused(PASSAGES[0])


def test_a_store_without_room_is_507(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "no space left")

    with served.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "put", lambda *_: False)
            with pytest.raises(ServerError, match="keep") as caught:
                client.add([PASSAGES[0], "short", PASSAGES[1]])
            assert caught.value.status == 507
        client.add(PASSAGES[3:4], document="one")
        with monkeypatch.context() as patch:
            patch.setattr(files, "mark", full)
            for ask in (client.replace, lambda document, texts: client.add(texts, document)):
                with pytest.raises(ServerError, match="no space left") as caught:
                    ask("one", PASSAGES[2:3])
                assert caught.value.status == 507
        with monkeypatch.context() as patch:
            patch.setattr(files, "remove", full)
            with pytest.raises(ServerError) as caught:
                client.forget_document("one")
            assert caught.value.status == 507
        client.forget_document("one")  # and so it can be repeated
    with Engine(BACKBONE, store=served.folder, tenant="acme", method="naive") as later:
        assert not later.knows(PASSAGES[3])


def test_some_that_do_not_fit_are_said_to_be_skipped(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    put = DiskStore.put
    monkeypatch.setattr(DiskStore, "put", lambda self, key, kv: kv.text != PASSAGES[1] and put(self, key, kv))
    with served.client() as client:
        result = client.add(PASSAGES[:3])
    assert (result.encoded, [one.index for one in result.skipped]) == (2, [1])


async def test_the_client_for_await_is_the_same(served: Served) -> None:
    async with AsyncChunkClient(served.url.removesuffix("/v1"), "red") as client:
        assert (await client.add(PASSAGES[:3], "one")).encoded == 3
        assert (await client.replace("one", PASSAGES[1:3])).removed == 1
        await client.forget(PASSAGES[1:2])
        assert (await client.models())[0]["id"] == "tiny"
        assert (await client.stats()).chunks == 1
        await client.forget_document("one")
        with pytest.raises(ServerError, match="401"):
            await AsyncChunkClient(served.url).stats()
    assert served.known() == []


def test_many_texts_are_sent_in_several_requests_and_counted_together() -> None:
    bodies: list[list[str]] = []

    def answer(request: Any) -> Any:
        assert len(request.content) < 32 << 20 and json.loads(request.content)["document"] == "one"
        bodies.append(json.loads(request.content)["texts"])
        return httpx.Response(200, json={"encoded": 1, "kept": 2, "skipped": [{"index": 1, "reason": "no"}]})

    texts = [f"{number} " + "\U0001f680" * 700_000 for number in range(7)]
    client = ChunkClient("http://server", client=httpx.Client(transport=httpx.MockTransport(answer)))
    result = client.add(texts, document="one")
    assert [text for body in bodies for text in body] == texts and len(bodies) == 4
    assert (result.encoded, result.kept) == (4, 8)
    assert [one.index for one in result.skipped] == [1, 3, 5, 7]


# ---- any service ----------------------------------------------------------------------------------------------------


class Recorder:
    """A service that notes what it was asked, and fails as it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error, self.inside, self.most = error, 0, 0

    async def _note(self, *call: Any) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(0)
        self.inside -= 1
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def add(self, tenant: str, texts: Sequence[str], document: str | None) -> Added:
        await self._note("add", tenant, texts, document)
        return Added(1, 2, [Skipped(3, "why")])

    async def replace(self, tenant: str, document: str, texts: Sequence[str]) -> Replaced:
        await self._note("replace", tenant, document, texts)
        return Replaced(1, 2, [], 4)

    async def forget(self, tenant: str, texts: Sequence[str], document: str | None = None) -> None:
        await self._note("forget", tenant, texts, document)

    async def forget_document(self, tenant: str, document: str) -> None:
        await self._note("forget_document", tenant, document)

    async def stats(self, tenant: str) -> ChunkStats:
        await self._note("stats", tenant)
        return ChunkStats(chunks=5)


def mounted(service: Recorder) -> Any:
    """The router in an application that knows nothing of it."""
    application = FastAPI()
    application.include_router(chunks.router(service))
    return httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://server/v1")


async def test_the_answers_are_as_documented() -> None:
    service = Recorder()
    client = mounted(service)
    added = {"encoded": 1, "kept": 2, "skipped": [{"index": 3, "reason": "why"}]}
    assert (await client.post("/chunks", json={"texts": ["a"], "document": "d"})).json() == added
    replaced = {"encoded": 1, "kept": 2, "skipped": [], "removed": 4}
    assert (await client.put("/documents/d/e", json={"texts": []})).json() == replaced
    assert (await client.delete("/documents/d%2Fe")).json() == {"id": "d/e", "deleted": True}
    assert (await client.post("/chunks/forget", json={"texts": ["a"]})).json() == {"deleted": True}
    assert (await client.post("/chunks/forget", json={"texts": ["a"], "document": "d"})).json() == {"deleted": True}
    assert (await client.get("/chunks/stats")).json()["chunks"] == 5
    assert service.calls == [
        ("add", "", ["a"], "d"),
        ("replace", "", "d/e", []),
        ("forget_document", "", "d/e"),
        ("forget", "", ["a"], None),
        ("forget", "", ["a"], "d"),
        ("stats", ""),
    ]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ConfigurationError("no"), 400, "invalid_request_error"),
        (TenantRefused("no"), 403, "permission_error"),
        (StoreError("no"), 507, "insufficient_storage"),
    ],
)
async def test_errors_of_a_service_have_the_shape_of_openai_s(error: Exception, status: int, kind: str) -> None:
    answer = await mounted(Recorder(error)).post("/chunks", json={"texts": ["a"]})
    assert answer.status_code == status
    assert answer.json() == {"error": {"message": "no", "type": kind, "param": None, "code": status}}


async def test_one_document_is_changed_by_one_request_at_a_time() -> None:
    service = Recorder()
    client = mounted(service)
    same = [client.put("/documents/d", json={"texts": ["a"]}) for _ in range(5)]
    await asyncio.gather(
        *same, client.post("/chunks", json={"texts": ["a"], "document": "d"}), client.delete("/documents/d")
    )
    assert len(service.calls) == 7 and service.most == 1
    await asyncio.gather(*(client.put(f"/documents/{number}", json={"texts": ["a"]}) for number in range(5)))
    assert service.most > 1
