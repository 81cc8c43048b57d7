"""The engine behind LangChain's objects."""

from __future__ import annotations

from typing import Any

from cacheclip_rag.frameworks import EngineHandle


def handle_of(source: Any) -> EngineHandle:
    """The handle behind a `ChatCacheClip`, also one with bound arguments, or a new one around an `Engine`.

    Raises TypeError for anything else.
    """
    from cacheclip_rag.engine import Engine

    if isinstance(source, Engine):
        return EngineHandle(engine=source)
    while hasattr(source, "bound"):  # model.bind(...), model.bind_tools(...), model.with_config(...)
        source = source.bound
    handle = getattr(source, "handle", None)
    if isinstance(handle, EngineHandle):
        return handle
    raise TypeError(f"a ChatCacheClip or a cacheclip_rag.Engine is wanted, not {type(source).__name__}")
