"""A reference to a server, for whatever hands chunks to it and for whoever asks it."""

from __future__ import annotations

from typing import Any, NoReturn

from ...errors import ConfigurationError, ServerError
from ...frameworks import ChunkKV, Handle
from ..client import ChunkClient, root
from .kv import ServerKV
from .per_process import PerProcess


class ServerHandle(Handle):
    """A server by its address and key. It can be copied, pickled and taken along by forked processes."""

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        """Nothing is asked of the server yet. Raises `ConfigurationError` for an address that is none."""
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f'base_url is an address as "http://localhost:8000/v1", not {base_url!r}')
        self.base_url, self._api_key = root(base_url), api_key or None
        self._clients = PerProcess[ChunkClient]()
        self._first: dict[str, Any] | None = None

    @property
    def kv(self) -> ChunkKV:
        return ServerKV(self.chunks, (self.base_url, self._api_key))

    def peek_kv(self) -> ChunkKV:
        return self.kv

    @property
    def chunks(self) -> ChunkClient:
        """The client for chunks and documents."""
        return self._clients.get(lambda: ChunkClient(self.base_url, self._api_key))

    @property
    def engine(self) -> NoReturn:
        raise ConfigurationError(
            f"the engine is in another process, at {self.base_url}: ask it for answers, give it chunks and documents"
        )

    def check_fusing(self, count: int) -> None:
        raise ConfigurationError(f"fuse={count} needs an engine of this process: leave it out")

    def model(self) -> str:
        """What the server's model is called: the first that it names. Raises `ServerError`."""
        return str(self._described()["id"])

    def context_length(self) -> int | None:
        """The tokens that the model's window has room for, as far as the server says. Raises `ServerError`."""
        length = self._described().get("max_model_len")
        return length if isinstance(length, int) else None

    def close(self) -> None:
        """Close the connections. The next call opens new ones."""
        self.chunks.close()
        self._clients.clear()

    def _described(self) -> dict[str, Any]:
        if self._first is None:
            models = self.chunks.models()
            if not models:
                raise ServerError(f"{self.base_url} serves no model")
            self._first = models[0]
        return self._first
