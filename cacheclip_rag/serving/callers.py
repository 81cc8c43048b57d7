"""Whose retrieval and whose prompt it is, so that an announced question counts in its own caller's prompts only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_caller: ContextVar[Hashable] = ContextVar("cacheclip_rag.caller", default=None)


@contextmanager
def calling(caller: Hashable) -> Iterator[None]:
    """Name the caller of everything in this block that names none, frameworks' retrievers and models included.

    What is announced in it (`Engine.hint`) counts only in prompts of an equal ``caller``: any hashable value, a user's
    or a request's id. A context variable holds it, so it reaches what the block awaits and the threads that frameworks
    start with their caller's context. A stream that is computed as it is read is read in the block. Raises TypeError
    for a value that cannot be hashed.
    """
    hash(caller)
    token = _caller.set(caller)
    try:
        yield
    finally:
        _caller.reset(token)


def named(caller: Hashable) -> Hashable:
    """``caller``, or if it is None the one whose `calling` block this is."""
    return _caller.get() if caller is None else caller
