"""Who may do what: keys and tenants, in front of any OpenAI-compatible application (pure ASGI)."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .problems import problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LIMIT = 32 << 20
"""The largest body of a request in bytes, unless another limit is given."""
TENANT = "cacheclip.tenant"
"""Where the tenant of a request stands in its ASGI scope."""

_LONGEST_METHOD = 200
_OPEN = ("/health",)
_CHUNKS = ("/v1/chunks", "/v1/documents")
_PARAMETERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "method": (lambda v: isinstance(v, str) and len(v) <= _LONGEST_METHOD, "a method's name"),
    "recompute_ratio": (
        lambda v: isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1,
        "a number from 0 to 1",
    ),
    "reuse": (lambda v: isinstance(v, bool), "true or false"),
    "report": (lambda v: isinstance(v, bool), "true or false"),
}
"""What a client may say about its own request: for each, a test of its value and what the error message asks for."""


def tenant_of(scope: Mapping[str, Any]) -> str:
    """Whose request this is, as `Access` found out from the key; "" where there is none in front."""
    return str(scope.get(TENANT, ""))


def read_keys(given: Iterable[str] = (), file: Path | None = None) -> dict[str, str]:
    """Tenants by API key, from ``key=tenant`` or ``key`` (of the tenant "") and from the lines of a file.

    What follows the last "=" is the tenant, so that a key may end with one. Raises `ConfigurationError` for a file that
    cannot be read or holds no key, an empty key, and one key of two tenants.
    """
    lines = list(given)
    if file is not None:
        try:
            found = [line.strip() for line in file.read_text("utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"the API keys cannot be read: {error}") from error
        found = [line for line in found if line and not line.startswith("#")]
        if not found:  # or the server would be open to everybody
            raise ConfigurationError(f"there is no API key in {file}: write one a line, as key or key=tenant")
        lines += found
    keys: dict[str, str] = {}
    for line in lines:
        key, _, tenant = (part.strip() for part in line.rpartition("="))
        key, tenant = (key, tenant) if key and tenant else (line.strip(), "")
        if not key:
            raise ConfigurationError("an API key is empty")
        if keys.setdefault(key, tenant) != tenant:
            raise ConfigurationError("one API key is given for two tenants")
    return keys


class Access:
    """ASGI middleware: finds out the tenant by the API key, and lets a client say of reuse only what is its own to say.

    With ``keys`` (tenants by key), all but /health needs ``Authorization: Bearer KEY``. A body above ``limit`` bytes is
    refused. From a JSON body everything under ``kv_transfer_params`` is removed, wherever it stands, but the `method`,
    `recompute_ratio`, `reuse` and `report` of ``{"kv_transfer_params": {"cacheclip": {...}}}``, or of a ``cacheclip``
    at the top. The application gets these as ``kv_transfer_params``, with the ``tenant`` added; requests about chunks
    get it by `tenant_of`. ``check_method`` is called with a method's name and raises `ConfigurationError`, which is
    answered with 400, as is a value of a wrong type. ``added``: what the application gets beside the tenant, so that it
    knows that this stood in front.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Mapping[str, str] | None = None,
        check_method: Callable[[str], object] = lambda method: None,
        limit: int = LIMIT,
        added: Mapping[str, str] | None = None,
    ) -> None:
        self.app, self._check_method, self._limit, self._added = app, check_method, limit, dict(added or {})
        self._keys = [(_digest(key.encode()), tenant) for key, tenant in (keys or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        tenant = self._tenant(scope)
        if tenant is None and path not in _OPEN:
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await _refuse(send, 401, "this server needs an API key: Authorization: Bearer KEY")
        scope = {**scope, TENANT: tenant or ""}
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        try:
            body = await self._body(scope, receive)
            if body and not any(path == one or path.startswith(f"{one}/") for one in _CHUNKS):
                body = self._cleaned(scope, body, tenant or "")
        except _TooLarge:
            return await _refuse(send, 413, f"the body of a request may have {self._limit:,} bytes at most")
        except (ConfigurationError, ValueError) as error:
            return await _refuse(send, 400, str(error))
        if body is None:  # the client is gone
            return None
        dropped = (b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
        if body or len(headers) < len(scope["headers"]):
            headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, _again(body, receive), send)

    def _tenant(self, scope: Scope) -> str | None:
        """None for a request without a valid key. All keys are compared, each in constant time."""
        if not self._keys:
            return ""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest, found = _digest(key.strip()), None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found if scheme.lower() == b"bearer" else None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client goes away meanwhile. No more than the limit is read."""
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._limit:
            raise _TooLarge
        parts, size, more = list[bytes](), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self._limit:
                raise _TooLarge
        return b"".join(parts)

    def _cleaned(self, scope: Scope, body: bytes, tenant: str) -> bytes:
        """The body as the application may see it. What is no JSON passes unchanged, unless it is said to be JSON."""
        try:
            given = json.loads(body)
            request = _without(given)
        except (ValueError, RecursionError) as error:
            kind = _header(scope, b"content-type").lower()
            if not kind or b"json" in kind:
                raise ValueError(f"the body is no JSON: {error}") from error
            return body
        if isinstance(request, dict):
            given = _own(given)
            request.pop("cacheclip", None)
            if "method" in given:
                self._check_method(given["method"])
            request["kv_transfer_params"] = {"cacheclip": {**given, **self._added, "tenant": tenant}}
        return json.dumps(request, separators=(",", ":")).encode()


class _TooLarge(Exception):
    pass


def _own(request: dict[str, Any]) -> dict[str, Any]:
    """What a client says about its own request. Raises ValueError."""
    transfer = request.get("kv_transfer_params") or {}
    if not isinstance(transfer, dict):
        raise ValueError("kv_transfer_params must be an object")
    given: dict[str, Any] = {}
    for part in (transfer.get("cacheclip") or {}, request.get("cacheclip") or {}):
        if not isinstance(part, dict):
            raise ValueError("cacheclip must be an object")
        given.update({name: part[name] for name in _PARAMETERS if part.get(name) is not None})
    for name, value in given.items():
        valid, wanted = _PARAMETERS[name]
        if not valid(value):
            raise ValueError(f"cacheclip.{name} must be {wanted}")
    return given


def _without(value: Any) -> Any:
    """All of it but what stands under ``kv_transfer_params``: engines take them inside sampling parameters, too."""
    if isinstance(value, dict):
        return {name: _without(part) for name, part in value.items() if name != "kv_transfer_params"}
    return [_without(part) for part in value] if isinstance(value, list) else value


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives the body, and then what else comes: that the client is gone."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps(problem(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Scope, name: bytes) -> bytes:
    found: bytes = next((value for known, value in scope["headers"] if known.lower() == name), b"")
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
