"""Closing a stream ends its request, whoever else still looks at it.

LlamaIndex's callbacks wrap a stream in a generator that does not close it, and hand its event handlers the exception it
was closed with, whose traceback leads back to the stream: with a handler that keeps events, an answer that nobody reads
any more would go on, or hold its memory, for as long as the handler does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator
from contextvars import ContextVar
from typing import Any, TypeVar

Stream = TypeVar("Stream", bound="Generator[Any, None, None] | AsyncGenerator[Any, None]")
Method = TypeVar("Method", bound=Callable[..., Any])

_opened: ContextVar[list[Any]] = ContextVar("_opened")


def noted(stream: Stream) -> Stream:
    """The stream, which the call it belongs to will close; see `closes_its_stream`."""
    _opened.get([]).append(stream)
    return stream


def closes_its_stream(method: Method) -> Method:
    """For a method, beneath callbacks, that returns a stream: closing what it returns closes what `noted` was given."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        streams: list[Any] = []
        token = _opened.set(streams)
        try:
            return _through(method(*args, **kwargs), streams)
        finally:
            _opened.reset(token)

    @functools.wraps(method)
    async def acall(*args: Any, **kwargs: Any) -> Any:
        streams: list[Any] = []
        token = _opened.set(streams)
        try:
            return _athrough(await method(*args, **kwargs), streams)
        finally:
            _opened.reset(token)

    # Which of the two has the method's type is known when it runs, not when types are checked.
    return acall if inspect.iscoroutinefunction(method) else call  # type: ignore[return-value]


def _through(outer: Generator[Any, None, None], streams: list[Any]) -> Generator[Any, None, None]:
    try:
        yield from outer
    finally:
        for stream in streams:
            stream.close()


async def _athrough(outer: AsyncGenerator[Any, None], streams: list[Any]) -> AsyncGenerator[Any, None]:
    try:
        async for piece in outer:
            yield piece
    finally:
        await outer.aclose()
        for stream in streams:
            await stream.aclose()
