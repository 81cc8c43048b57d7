"""Runs blocking calls and generators in threads, so that they do not block the event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

_END = object()


async def in_thread(call: Callable[[threading.Event], T]) -> T:
    """Call it on another thread. It is given an event that is set when nobody waits for it any more: a thread cannot be
    cancelled, but the engine looks at this between two tokens.
    """
    cancel = threading.Event()
    try:
        return await asyncio.to_thread(call, cancel)
    finally:
        cancel.set()


async def pump(items: Generator[T, None, None], cancel: threading.Event) -> AsyncGenerator[T, None]:
    """Iterate ``items`` on a thread of its own.

    Leaving early sets ``cancel`` and does not wait: the thread, which alone touches ``items``, closes them at its next
    one. Nothing here outlives the call, so any number of event loops may share an LLM.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[Any, BaseException | None]]()

    def put(item: Any, error: BaseException | None = None) -> None:
        try:
            loop.call_soon_threadsafe(queue.put_nowait, (item, error))
        except RuntimeError:  # the loop is closed: nobody is listening any more
            cancel.set()

    def run() -> None:
        error: BaseException | None = None
        try:
            while not cancel.is_set():
                put(next(items))
        except StopIteration:
            pass
        except BaseException as raised:
            error = raised
        finally:
            items.close()
            put(_END, error)

    threading.Thread(target=contextvars.copy_context().run, args=(run,), name="cacheclip-stream").start()
    try:
        while True:
            item, error = await queue.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        cancel.set()
