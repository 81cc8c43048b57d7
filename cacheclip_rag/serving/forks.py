"""What becomes of open engines when the process forks: the parent's go on, the child's can be used, or say why not.

Of the threads, only the one that forks comes along, and neither do those of PyTorch. So the fork waits until no model
is computing, and in the child every lock is a new one, threads are started again when they are needed, and PyTorch
computes with the one thread there is.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

import torch

from .lock import FairLock

log = logging.getLogger("cacheclip_rag")

PATIENCE = 30.0
"""Seconds that a fork waits for a model that is computing."""
_LARGE = 256
"""Containers of more items than this hold data, and are not looked through for locks."""
_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())

REMEDY = "open it after the fork: in gunicorn's post_fork, Celery's worker_process_init, or with the spawn start method"


class OnDevice(Protocol):
    @property
    def device(self) -> torch.device: ...


class Watched(Protocol):
    """What a fork needs to know of an engine."""

    lock: FairLock

    @property
    def backbone(self) -> OnDevice: ...


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_held: list[tuple[Watched, object | None]] = []
_busy: list[Watched] = []


def watch(engine: Watched) -> None:
    """Prepare this engine for forks, for as long as it lives."""
    _watched.add(engine)


def _before() -> None:
    del _held[:], _busy[:]
    caller = sys._getframe(1)
    for engine in list(_watched):
        try:
            _held.append((engine, engine.lock.hold(caller, PATIENCE)))
        except TimeoutError:
            _busy.append(engine)


def _in_parent() -> None:
    for engine, entry in _held:
        engine.lock.release(entry)
    del _held[:], _busy[:]


def _in_child() -> None:
    engines = list(_watched)
    for engine in engines:
        for part in _parts(engine, set()):
            _renew(part)
        if engine.backbone.device.type != "cpu":
            engine.lock.refusal = f"a model on {engine.backbone.device} cannot be used in a forked process; {REMEDY}"
        elif engine in _busy:
            engine.lock.refusal = f"this model was computing in another thread when the process forked; {REMEDY}"
    if engines and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        log.info("this process was forked after a model was opened: PyTorch computes with one thread here")
    del _held[:], _busy[:]


def _parts(thing: Any, seen: set[int]) -> Iterator[Any]:
    """This object of ours and all that it holds, once each."""
    waiting = [thing]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            waiting += list(thing.values()) if len(thing) <= _LARGE else []
        elif isinstance(thing, (list, tuple, set, frozenset)):
            waiting += list(thing) if len(thing) <= _LARGE else []
        elif type(thing).__module__.partition(".")[0] == "cacheclip_rag" and hasattr(thing, "__dict__"):
            yield thing
            waiting += list(vars(thing).values())


def _renew(part: Any) -> None:
    """New locks in place of those that a thread of the parent may hold."""
    for name, value in list(vars(part).items()):
        if type(value) is _LOCK:
            object.__setattr__(part, name, threading.Lock())
        elif type(value) is _RLOCK:
            object.__setattr__(part, name, threading.RLock())
    after = getattr(part, "after_fork", None)
    if after is not None:
        after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
