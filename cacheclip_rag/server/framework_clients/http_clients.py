"""HTTP clients for clients of OpenAI's API that are used in any event loop and taken along by forked processes."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from openai import DefaultAsyncHttpxClient, DefaultHttpxClient

from .per_process import PerProcess


class AnyProcessClient(httpx.Client):
    """A client whose connections are those of the process that sends."""

    def __init__(self) -> None:
        super().__init__(transport=httpx.BaseTransport())  # which is not used, and makes no context for TLS
        self._senders = PerProcess[httpx.Client]()

    def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        return self._senders.get(DefaultHttpxClient).send(request, **options)


class AnyLoopClient(httpx.AsyncClient):
    """A client whose connections are those of the event loop, and the process, that sends."""

    def __init__(self) -> None:
        super().__init__(transport=httpx.AsyncBaseTransport())
        self._senders = PerProcess[httpx.AsyncClient]()

    async def send(self, request: httpx.Request, **options: Any) -> httpx.Response:
        sender = self._senders.get(DefaultAsyncHttpxClient, asyncio.get_running_loop())
        return await sender.send(request, **options)
