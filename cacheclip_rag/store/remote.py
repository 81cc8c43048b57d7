"""Chunk KV elsewhere: object stores and network shares through fsspec, as a tier that may be slow, gone or wrong.

The layout is the disk's, ``URL/<namespace digest>/<key>.safetensors``, and so are the bytes: a folder that was copied
there by other means serves as well. Nothing is taken that the disk would not serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from ..background import Background
from ..chunks import ChunkKV, Namespace
from ..errors import ConfigurationError
from . import files, format
from .base import Entry, StoreStats

log = logging.getLogger("cacheclip_rag")

T = TypeVar("T")

_LONGEST_PAUSE = 600.0  # seconds without trying a remote that keeps failing
_AT_ONCE = 8  # calls under way, those that hang included
_LISTING = 4  # times the timeout
_FAILURES = 3  # in a row, however quick
_WAITING_BYTES = 1 << 30  # of chunks that wait for their upload


class Unavailable(OSError):
    """The remote did not answer in time, failed, or is not asked for a while because it did."""


class Remote:
    """A place for chunk KV, with bounded patience: no call takes longer than ``timeout`` seconds.

    A call that takes so long, or three failures in a row, break the circuit: for ``pause`` seconds (twice as long each
    time, ten minutes at most) nobody asks, then one call tries. So a dead remote delays requests by at most
    ``2 * timeout`` in every pause.
    """

    def __init__(
        self, url: str, *, timeout: float = 5.0, pause: float = 30.0, max_bytes: int = 2 << 30, **options: Any
    ) -> None:
        """``url`` and ``options`` are fsspec's (``"s3://bucket/folder"``, ``endpoint_url=...``).

        ``max_bytes``: larger files are not fetched. Raises `ConfigurationError` for a url that fsspec does not know, or
        a file system that is not installed.
        """
        try:
            import fsspec
        except ImportError as error:
            raise ConfigurationError('a remote store needs fsspec: pip install "cacheclip-rag[remote]"') from error
        try:
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ImportError, ValueError, TypeError) as error:
            raise ConfigurationError(f"{url} cannot be used as a remote store: {error}") from error
        self.url, self.timeout, self.pause, self.max_bytes = url, timeout, pause, max_bytes
        self._slots = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._failures, self._lost = 0, 0.0
        self._resting, self._until, self._trying = pause, 0.0, False
        self.broken = False
        """Whether the circuit is open."""

    def after_fork(self) -> None:
        """In a forked process: the calls that were under way are the other one's."""
        self._slots, self._trying = threading.Semaphore(_AT_ONCE), False

    def call(self, work: Callable[[], T], patience: float | None = None) -> T:
        """``work()``, if it is done in time (``timeout``, or ``patience`` seconds). Raises FileNotFoundError, or
        `Unavailable`.
        """
        patience = self.timeout if patience is None else patience
        self._enter()
        if not self._slots.acquire(blocking=False):
            self._failed(self.timeout)
            raise Unavailable(f"{self.url}: {_AT_ONCE} calls hang")
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            finally:
                self._slots.release()

        start = time.monotonic()
        # A thread of its own that nobody joins: one that hangs must hold up neither the next call nor the exit.
        try:
            threading.Thread(target=run, name="cacheclip-remote", daemon=True).start()
        except RuntimeError as error:  # too many of them
            self._slots.release()
            self._failed(0.0)
            raise Unavailable(f"{self.url}: {error}") from error
        try:
            result = future.result(patience)
        except FileNotFoundError:
            self._succeeded()
            raise
        except FutureTimeout as error:
            self._failed(time.monotonic() - start)
            raise Unavailable(f"{self.url} did not answer in {patience:g} s") from error
        except Exception as error:
            self._failed(time.monotonic() - start)
            raise Unavailable(f"{self.url}: {type(error).__name__}: {error}") from error
        self._succeeded()
        return result

    def read(self, name: str) -> bytes:
        """The file's bytes. Raises what `call` does, and `Unavailable` for more than ``max_bytes``."""

        data = self.read_head(name, self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise Unavailable(f"{name} is larger than {self.max_bytes:,} bytes")
        return data

    def read_head(self, name: str, size: int) -> bytes:
        """The file's first ``size`` bytes, or what there is. Raises what `call` does."""

        def work() -> bytes:
            path = f"{self.root}/{name}"
            try:
                return bytes(self.fs.cat_file(path, start=0, end=size))
            except FileNotFoundError:
                raise
            except Exception:  # an empty object has no first byte that a server could send
                if self.fs.info(path)["size"]:
                    raise
                return b""

        return self.call(work)

    def listing(self) -> dict[str, tuple[int, float]]:
        """Bytes and time of change (epoch seconds; 0: not known) of all files, by name. Raises `Unavailable`.

        A listing comes in pages, so it is given a few times as long as other calls.
        """

        def work() -> dict[str, tuple[int, float]]:
            try:
                found = self.fs.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
            start = len(self.fs._strip_protocol(self.root).rstrip("/")) + 1
            return {path[start:]: (about.get("size") or 0, _changed(about)) for path, about in found.items()}

        return self.call(work, _LISTING * self.timeout)

    def write(self, name: str, data: bytes, *, again: bool) -> None:
        """Keep a file, unless it is there and is not to be written ``again``. Raises `Unavailable`."""
        path = f"{self.root}/{name}"

        def work() -> None:
            if not again and self._exists(path):
                return
            if "file" in self.fs.protocol:  # a network share: what is half written must not have the name
                files.make_directory(Path(path).parent)
                files.publish(Path(path), data)
            else:
                self.fs.pipe_file(path, data)

        self.call(work)

    def remove(self, name: str) -> None:
        """Remove a file; that it is gone already is no error. Raises `Unavailable`."""

        def work() -> None:
            if self._exists(path := f"{self.root}/{name}"):
                self.fs.rm_file(path)

        try:
            self.call(work)
        except FileNotFoundError:
            pass

    def _exists(self, path: str) -> bool:
        try:
            self.fs.info(path)
        except FileNotFoundError:
            return False
        return True

    # ---- the circuit breaker --------------------------------------------------------------------------------------

    def _enter(self) -> None:
        with self._lock:
            if self.broken:
                if self._trying or time.monotonic() < self._until:
                    raise Unavailable(f"{self.url} is not asked for now, because it failed")
                self._trying = True

    def _succeeded(self) -> None:
        with self._lock:
            if self.broken:
                log.warning("remote store %s answers again", self.url)
            self._failures, self._lost, self._resting, self.broken, self._trying = 0, 0.0, self.pause, False, False

    def _failed(self, seconds: float) -> None:
        with self._lock:
            self._failures += 1
            self._lost += seconds
            if self._trying or (not self.broken and (self._failures >= _FAILURES or self._lost >= self.timeout)):
                self._until = time.monotonic() + self._resting
                log.warning("remote store %s is not asked for %.0f s", self.url, self._resting)
                self._resting = min(2 * self._resting, _LONGEST_PAUSE)
                self.broken, self._trying = True, False


class RemoteStore:
    """A `ChunkStore` of one namespace at a `Remote`. Chunks are uploaded in the background, one at a time.

    It answers `in` and lists entries without asking the remote, so it knows of what it uploaded or fetched only. Chunks
    whose upload fails stay where they are nearer by.
    """

    def __init__(self, remote: Remote, namespace: Namespace) -> None:
        self.remote, self.namespace = remote, namespace
        self._known: dict[str, int] = {}
        self._damaged: set[str] = set()
        self._unwanted: set[str] = set()
        self._waiting = 0
        self._stats = StoreStats()
        self._lock = threading.Lock()
        self._uploads: Background[tuple[str, ChunkKV]] = Background(self._upload)

    def get(self, key: str) -> ChunkKV | None:
        if not _is_key(key) or key in self._unwanted:
            self._missed()
            return None
        try:
            data = self.remote.read(self._name(key))
            chunk = format.load(data, key, self.namespace)
        except format.Rejected as reason:
            log.warning("chunk %s from %s is not served: %s", key[:12], self.remote.url, reason)
            with self._lock:
                self._damaged.add(key)
            self._missed(str(reason))
            return None
        except FileNotFoundError:
            self._missed()
            return None
        except (OSError, MemoryError) as error:
            log.info("chunk %s was not fetched: %s", key[:12], error)
            self._missed("unavailable")
            return None
        with self._lock:
            self._stats.hits += 1
            self._known[key] = len(data)
        return chunk

    def put(self, key: str, chunk: ChunkKV) -> bool:
        """Upload later. True when it is known to be there already."""
        if not _is_key(key):
            return False
        with self._lock:
            self._unwanted.discard(key)
            if key in self._known and key not in self._damaged:
                return True
            if self._waiting + chunk.nbytes > _WAITING_BYTES:
                self._stats.failed_puts += 1
                return False
            self._waiting += chunk.nbytes
        self._uploads.add([(key, chunk)])
        return False

    def delete(self, keys: Collection[str]) -> None:
        """Remove entries, those that wait for their upload included; tried again later when the remote is away."""
        with self._lock:
            self._unwanted.update(filter(_is_key, keys))
            for key in keys:
                self._known.pop(key, None)
        self._remove_unwanted()

    def entries(self) -> Iterator[Entry]:
        return iter(())

    def refresh(self) -> bool:
        return False

    changes = 0

    def vanished(self) -> list[str]:
        return []

    def flush(self) -> None:
        """Wait for the uploads, and remove what is still to be removed. Bounded: when the remote is dead, the circuit
        breaker lets both fail.
        """
        self._uploads.flush()
        self._remove_unwanted()

    def stats(self) -> StoreStats:
        with self._lock:
            held = dict(entries=len(self._known), nbytes=sum(self._known.values()))
            return replace(self._stats, **held, rejected=dict(self._stats.rejected))

    def __contains__(self, key: object) -> bool:
        return key in self._known

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _name(self, key: str) -> str:
        return f"{self.namespace.digest[:32]}/{key}{format.SUFFIX}"

    def _missed(self, reason: str | None = None) -> None:
        with self._lock:
            self._stats.misses += 1
            if reason:
                self._stats.reject(reason)

    def _upload(self, task: tuple[str, ChunkKV]) -> None:
        key, chunk = task
        try:
            if key not in self._unwanted:
                data = format.dump(key, chunk, self.namespace)
                self.remote.write(self._name(key), data, again=key in self._damaged)
                with self._lock:
                    self._damaged.discard(key)
                    if key not in self._unwanted:
                        self._known[key] = len(data)
        except (OSError, UnicodeEncodeError, MemoryError) as error:
            log.warning("chunk %s was not uploaded: %s", key[:12], error)
            with self._lock:
                self._stats.failed_puts += 1
        finally:
            with self._lock:
                self._waiting -= chunk.nbytes
        self._remove_unwanted()

    def _remove_unwanted(self) -> None:
        for key in list(self._unwanted):
            try:
                self.remote.remove(self._name(key))
            except OSError as error:
                log.warning("chunk %s is still at %s: %s", key[:12], self.remote.url, error)
                return
            with self._lock:
                if not self._waiting:  # an upload that is under way would bring it back
                    self._unwanted.discard(key)


def _changed(about: Mapping[str, Any]) -> float:
    """When a file was written, as its file system calls that."""
    when = next((about[name] for name in ("mtime", "LastModified", "last_modified", "created") if about.get(name)), 0)
    try:
        return float(when.timestamp() if isinstance(when, datetime) else when)
    except (TypeError, ValueError):
        return 0.0


def _is_key(key: str) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")
