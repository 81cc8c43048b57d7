"""Who may do what over HTTP: keys, tenants, and what of a client's body reaches the application."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cacheclip_rag import ConfigurationError
from cacheclip_rag.server.access import Access, read_keys, tenant_of

KEYS = {"red": "acme", "blue": "zenith"}
GENERATING = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
OWN = {"method": "naive", "recompute_ratio": 0.25, "reuse": True, "report": False}


async def mirror(scope: Any, receive: Any, send: Any) -> None:
    """An application that says what it was asked, and by whom."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    length = dict(scope["headers"]).get(b"content-length", b"0").decode()
    said = {"tenant": tenant_of(scope), "path": scope["path"], "body": body.decode("latin-1"), "length": int(length)}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(said).encode()})


def check(method: str) -> None:
    if method != "naive":
        raise ConfigurationError(f'unknown method "{method}" Known: naive')


def client(key: str | None = "red", keys: dict[str, str] | None = KEYS, **options: Any) -> Any:
    transport = httpx.ASGITransport(Access(mirror, keys=keys, check_method=check, **options))
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


async def seen(body: dict[str, Any], path: str = GENERATING[0], **options: Any) -> dict[str, Any]:
    """The body that the application gets, of a request that is let through."""
    response = await client(**options).post(path, json=body)
    assert response.status_code == 200, response.text
    said = response.json()
    assert said["length"] == len(said["body"])
    return dict(json.loads(said["body"]))


async def refusal(status: int, **request: Any) -> str:
    response = await client(**request.pop("options", {})).request(**{"method": "POST", "url": GENERATING[0]} | request)
    assert response.status_code == status and response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["code"] == status
    return str(error["message"])


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [None, "", "redd", "re", "RED", "red blue"])
@pytest.mark.parametrize("url", ["/v1/models", "/v1/chunks", "/metrics", "/health/", "//health", "/v1/health"])
async def test_without_a_valid_key_nothing_is_served(key: str | None, url: str) -> None:
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        assert "API key" in await refusal(401, method=method, url=url, options={"key": key})


@pytest.mark.parametrize("header", ["red", "Basic red", "Bearer  ", "Bearer: red"])
async def test_the_key_is_a_bearer_s(header: str) -> None:
    await refusal(401, headers={"Authorization": header}, options={"key": None})


async def test_two_keys_in_one_request_are_none() -> None:
    await refusal(
        401, headers=[("Authorization", "Bearer red"), ("Authorization", "Bearer blue")], options={"key": None}
    )


async def test_health_needs_no_key() -> None:
    assert (await client(None).get("/health")).status_code == 200


@pytest.mark.parametrize(("key", "tenant"), KEYS.items())
async def test_the_key_says_whose_request_it_is(key: str, tenant: str) -> None:
    for url in ("/v1/chunks", "/v1/models"):
        assert (await client(key).get(url)).json()["tenant"] == tenant


async def test_without_keys_all_is_open_and_nobody_s() -> None:
    assert (await client("any", None).get("/v1/chunks")).json()["tenant"] == ""
    assert (await seen({"cacheclip": {"tenant": "acme"}}, keys=None))["kv_transfer_params"]["cacheclip"]["tenant"] == ""


async def test_a_websocket_without_a_key_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await Access(mirror, keys=KEYS)(scope, None, send)  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_keys_are_read_from_the_command_line_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\n\nred = acme\nplain\n")
    assert read_keys(["bm90Cg==", "blue=zenith", "Zm9v==acme"], tmp_path / "keys") == {
        "bm90Cg==": "",
        "blue": "zenith",
        "Zm9v=": "acme",
        "red": "acme",
        "plain": "",
    }


@pytest.mark.parametrize("given", [[""], [" "], ["red=acme", "red=zenith"]])
def test_keys_that_make_no_sense_are_refused(given: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        read_keys(given)


@pytest.mark.parametrize("text", [None, "", "# none yet\n", b"\xff\xfe"])
def test_a_file_without_keys_opens_no_server_to_everybody(tmp_path: Path, text: str | bytes | None) -> None:
    if text is not None:
        (tmp_path / "keys").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigurationError):
        read_keys(file=tmp_path / "keys")


# ---- what a client may say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*GENERATING, "/v1/messages", "/inference/v1/generate", "/anything/else"])
async def test_what_is_the_client_s_to_say_reaches_the_application(path: str) -> None:
    for given in ({"kv_transfer_params": {"cacheclip": OWN}}, {"cacheclip": OWN}):
        body = await seen({"model": "m", "prompt": "Ünïcode", **given}, path)
        assert body == {
            "model": "m",
            "prompt": "Ünïcode",
            "kv_transfer_params": {"cacheclip": {**OWN, "tenant": "acme"}},
        }


async def test_both_ways_at_once_are_joined_and_null_says_nothing() -> None:
    given = {"kv_transfer_params": {"cacheclip": {"report": True, "reuse": None}}, "cacheclip": {"method": "naive"}}
    assert (await seen(given))["kv_transfer_params"]["cacheclip"] == {
        "report": True,
        "method": "naive",
        "tenant": "acme",
    }
    assert (await seen({"kv_transfer_params": None, "cacheclip": None}))["kv_transfer_params"] == {
        "cacheclip": {"tenant": "acme"}
    }


@pytest.mark.parametrize(
    "forged",
    [
        {"tenant": "zenith"},
        {"ingest": ["a text"], "encode": True, "chunks": ["a text"], "document": "d"},
        {"forget": ["a text"], "forget_document": "d", "remove": True},
        {"store": "/tmp", "secret": "s", "Tenant": "zenith", "tenant ": "zenith"},
    ],
    ids=["tenant", "ingestion", "forgetting", "others"],
)
@pytest.mark.parametrize("path", GENERATING)
async def test_what_is_not_the_client_s_to_say_is_removed(forged: dict[str, Any], path: str) -> None:
    wanted = {"cacheclip": {"tenant": "acme"}}
    for given in (
        {"cacheclip": forged},
        {"kv_transfer_params": {"cacheclip": forged}},
        {"kv_transfer_params": {**forged, "do_remote_prefill": True, "prompt_token_ids": [1]}},
        {"sampling_params": {"extra_args": {"kv_transfer_params": {"cacheclip": forged}}}},
        {"vllm_xargs": {"kv_transfer_params": {"cacheclip": forged}}, "requests": [{"kv_transfer_params": forged}]},
    ):
        body = await seen(given, path)
        assert body.pop("kv_transfer_params") == wanted
        written = json.dumps(body)
        assert not any(name in written for name in ("kv_transfer_params", "cacheclip", *forged))


async def test_a_field_that_is_given_twice_is_forged_in_neither_place() -> None:
    once = b'"cacheclip": {"tenant": "a"}, "kv_transfer_params": {"cacheclip": {"tenant": "a"}}'
    raw = b"{" + once + b", " + once + b"}"
    response = await client().post(GENERATING[0], content=raw, headers={"content-type": "application/json"})
    assert json.loads(response.json()["body"]) == {"kv_transfer_params": {"cacheclip": {"tenant": "acme"}}}


async def test_a_trailing_slash_or_a_prefix_is_no_way_around() -> None:
    for path in ("/v1/chat/completions/", "/api/v1/chat/completions", "/v1/chunksomething", "/v1//chat/completions"):
        body = await seen({"cacheclip": {"tenant": "zenith"}}, path)
        assert body == {"kv_transfer_params": {"cacheclip": {"tenant": "acme"}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", 3),
        ("method", ["naive"]),
        ("method", "n" * 300),
        ("recompute_ratio", "0.2"),
        ("recompute_ratio", 1.5),
        ("recompute_ratio", True),
        ("recompute_ratio", float("nan")),
        ("reuse", "no"),
        ("reuse", 0),
        ("report", "yes"),
    ],
)
async def test_values_of_wrong_types_are_named(field: str, value: Any) -> None:
    content = json.dumps({"cacheclip": {field: value}}).encode()
    message = await refusal(400, content=content, headers={"content-type": "application/json"})
    assert f"cacheclip.{field}" in message


@pytest.mark.parametrize("given", [{"cacheclip": "naive"}, {"kv_transfer_params": [1]}])
async def test_what_is_no_object_is_refused(given: dict[str, Any]) -> None:
    assert "object" in await refusal(400, json=given)


async def test_an_unknown_method_is_refused_with_the_list() -> None:
    assert "Known: naive" in await refusal(400, json={"cacheclip": {"method": "nave"}})


# ---- bodies ---------------------------------------------------------------------------------------------------------


async def pieces(count: int, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


@pytest.mark.parametrize("url", ["/v1/chunks", GENERATING[0]])
async def test_a_body_of_50_mb_is_refused(url: str) -> None:
    assert "33,554,432" in await refusal(413, url=url, content=b"x" * (50 << 20))


async def test_no_more_than_the_limit_is_read_where_no_length_is_given() -> None:
    sent = 0

    async def counted() -> AsyncIterator[bytes]:
        nonlocal sent
        async for piece in pieces(50):
            sent += 1
            yield piece

    # An ASGI transport reads a request's body as the application asks for it.
    message = await refusal(413, url="/v1/chunks", content=counted(), options={"limit": 3 << 20})
    assert "3,145,728" in message and sent == 4


async def test_a_body_in_pieces_arrives_whole_and_cleaned() -> None:
    async def content() -> AsyncIterator[bytes]:
        for piece in (b'{"cacheclip": {"ten', b'ant": "zenith"}, ', b'"prompt": "Hello"}'):
            yield piece

    headers = {"content-type": "application/json"}
    said = (await client().post(GENERATING[1], content=content(), headers=headers)).json()
    assert json.loads(said["body"]) == {
        "prompt": "Hello",
        "kv_transfer_params": {"cacheclip": {"tenant": "acme"}},
    }
    assert said["length"] == len(said["body"])


async def test_chunks_pass_as_they_are() -> None:
    raw = b'{ "texts": ["kv_transfer_params", "cacheclip"] }'
    for url in ("/v1/chunks", "/v1/chunks/forget", "/v1/documents/a"):
        assert (await client().post(url, content=raw)).json()["body"] == raw.decode()


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", ""])
@pytest.mark.parametrize("raw", [b"{", b"\xff{}", b"[" * 100_000, b'{"a": ' * 5_000 + b"1" + b"}" * 5_000])
async def test_what_is_no_json_is_refused_where_it_is_said_to_be(raw: bytes, kind: str) -> None:
    assert "JSON" in await refusal(400, content=raw, headers={"content-type": kind})


async def test_what_is_something_else_passes_unchanged() -> None:
    for kind in ("multipart/form-data; boundary=x", "application/octet-stream"):
        said = (await client().post("/v1/audio", content=b"--x\r\n{", headers={"content-type": kind})).json()
        assert said["body"] == "--x\r\n{"


async def test_json_under_another_name_is_cleaned_all_the_same() -> None:
    raw = json.dumps({"cacheclip": {"tenant": "zenith"}}).encode()
    for content in (raw, b"\xef\xbb\xbf" + raw, raw.decode().encode("utf-16")):
        said = (await client().post(GENERATING[0], content=content, headers={"content-type": "text/plain"})).json()
        assert json.loads(said["body"]) == {"kv_transfer_params": {"cacheclip": {"tenant": "acme"}}}


async def test_a_client_that_leaves_before_its_body_is_there_is_not_served() -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    scope = {"type": "http", "path": "/v1/chunks", "headers": [(b"authorization", b"Bearer red")]}
    await Access(mirror, keys=KEYS)(scope, receive, send)
