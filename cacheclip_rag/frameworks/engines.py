"""Engines, one per process for all objects with equal settings, and handles to them that can be pickled."""

from __future__ import annotations

import dataclasses
import os
import threading
import uuid
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .chunk_kv import ChunkKV, Handle

if TYPE_CHECKING:  # torch and transformers are loaded with the first engine, so that ingestion workers need not wait
    from ..engine import Engine


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is opened with; equal settings mean the same engine."""

    model: str
    auxiliary: str | None = None
    kv_dir: str | None = None
    method: str | None = None
    prefix: str | None = None
    tenant: str = ""
    dtype: str = "auto"
    device: str = "auto"
    max_requests: int = 16
    fuse_when_idle: bool = False

    @classmethod
    def of(cls, model: str, fields: Any) -> EngineSettings:
        """Those of a framework's model, which has them as attributes. What is not among them can differ from call to
        call on one engine.
        """
        given = {f.name: getattr(fields, f.name) for f in dataclasses.fields(cls) if f.name != "model"}
        if given["kv_dir"] is not None:
            given["kv_dir"] = os.path.abspath(os.path.expanduser(given["kv_dir"]))
        return cls(**{**given, "model": model, "method": encoding_of(given["method"])})

    def open(self) -> Engine:
        from ..engine import Engine

        return Engine(
            self.model,
            auxiliary=self.auxiliary,
            method=self.method,
            store=self.kv_dir,
            prefix=self.prefix,
            tenant=self.tenant,
            dtype=self.dtype,
            device=self.device,
            max_requests=self.max_requests,
            fuse_when_idle=self.fuse_when_idle,
        )


def encoding_of(method: str | None) -> str | None:
    """What of a method an engine has to be opened for.

    Selection can differ from call to call; only the encoding of chunks is fixed for an engine. So models that compare
    methods share one engine, its weights and its chunk KV. Raises `ConfigurationError` for an unknown method.
    """
    if method is None:
        return None
    from ..kv.encode import Isolated
    from ..methods import resolve

    encode, name = resolve(method).encode, method.partition(":")[0]
    if encode == Isolated():
        return None
    return name if resolve(name).encode == encode else method


_engines: dict[EngineSettings, Engine] = {}
_opening: dict[EngineSettings, threading.Lock] = {}
_given: weakref.WeakValueDictionary[str, Engine] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _opened(settings: EngineSettings) -> Engine:
    """The engine with these settings, opened at most once however many threads ask at the same time."""
    with _lock:
        mine = _opening.setdefault(settings, threading.Lock())
    with mine:
        if settings not in _engines:
            _engines[settings] = settings.open()
        return _engines[settings]


def _forget_all() -> None:
    """A forked process must not use its parent's engines: their threads, and torch's, did not come along."""
    global _lock
    _lock = threading.Lock()
    _engines.clear()
    _opening.clear()
    _given.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class EngineHandle(Handle):
    """A reference to an engine that the user gave, or that is opened from settings at first use.

    It can be pickled. In another process a handle with settings opens an engine of its own there; one around a given
    engine cannot.
    """

    def __init__(self, settings: EngineSettings | None = None, engine: Engine | None = None) -> None:
        self.settings = settings
        self.token = uuid.uuid4().hex
        self._engine = engine
        if engine is not None:
            _given[self.token] = engine

    @property
    def engine(self) -> Engine:
        """Raises what `cacheclip_rag.Engine` raises when it opens, once settings are tried."""
        engine = self.peek()
        if engine is not None:
            return engine
        if self.settings is None:
            raise ConfigurationError(
                "this object was made around an Engine of another process; "
                "make it from fields (model_name or model, kv_dir, ...) to use it in several processes"
            )
        return _opened(self.settings)

    def peek(self) -> Engine | None:
        """The engine if it is open in this process."""
        if self.settings is not None:
            return _engines.get(self.settings)
        return self._engine or _given.get(self.token)

    @property
    def kv(self) -> ChunkKV:
        return _kv_of(self.engine)

    def peek_kv(self) -> ChunkKV | None:
        engine = self.peek()
        return None if engine is None else _kv_of(engine)

    def check_fusing(self, count: int) -> None:
        """Any engine can."""

    def token_ids(self, text: str) -> list[int]:
        """The model's tokens of a text. A function for whoever counts, which can be copied and pickled."""
        ids: list[int] = self.engine.backbone.tokenise(text).ids.tolist()
        return ids

    def release(self) -> None:
        """Stop the engine's background work; one that was opened from settings is let go of, too."""
        engine = self.peek()
        if engine is not None:
            engine.close()
        if self.settings is not None:
            _engines.pop(self.settings, None)

    def __deepcopy__(self, memo: Any) -> EngineHandle:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self.settings, self.token)


def handle_of(source: Any) -> Handle:
    """The handle of a framework's model, also of one with bound arguments, or a new one around an `Engine`.

    Raises TypeError for anything else.
    """
    from ..engine import Engine

    if isinstance(source, Engine):
        return EngineHandle(engine=source)
    while hasattr(source, "bound"):  # LangChain's model.bind(...), model.bind_tools(...), model.with_config(...)
        source = source.bound
    handle = getattr(source, "handle", None)
    if isinstance(handle, Handle):
        return handle
    raise TypeError(f"a CacheClipLLM, a ChatCacheClip or a cacheclip_rag.Engine is wanted, not {type(source).__name__}")


def _kv_of(engine: Engine) -> ChunkKV:
    from .engine_kv import EngineKV

    return EngineKV(engine)


def _arrive(settings: EngineSettings | None, token: str) -> EngineHandle:
    handle = EngineHandle(settings)
    handle.token, handle.travelled = token, True
    return handle
