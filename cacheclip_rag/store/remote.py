"""The remote tier: object stores and network shares through fsspec, which may be slow, unreachable or corrupt.

The layout is the disk's, ``URL/<namespace digest>/<key>.safetensors``, and so are the bytes: a folder that was copied
there by other means serves as well. Nothing is taken that the disk would not serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from ..background import Background
from ..chunks import ChunkKV, Namespace
from ..errors import ConfigurationError
from . import files, format
from .base import Entry, StoreStats
from .disk import DiskStore

log = logging.getLogger("cacheclip_rag")

T = TypeVar("T")

CALLS_AT_ONCE = 8
"""Calls under way to one remote, those that hang included."""

_LONGEST_PAUSE = 600.0  # seconds without trying a remote that keeps failing
_LISTING = 4  # times the timeout
_FAILURES = 3  # in a row, however quick
_PIECE = 1 << 20  # bytes read at a time
_WAITING_BYTES = 1 << 30  # of chunks that wait for their upload


class Unavailable(OSError):
    """The remote did not answer in time, failed, or is not asked for a while because it did."""


class Remote:
    """A remote location for chunk KV, with a time limit: no call takes longer than ``timeout`` seconds.

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
        self._slots = threading.Semaphore(CALLS_AT_ONCE)
        self._lock = threading.Lock()
        self._failures, self._lost = 0, 0.0
        self._resting, self._until, self._trying = pause, 0.0, False
        self.broken = False
        """Whether the circuit is open."""

    def after_fork(self) -> None:
        """In a forked process: the calls that were under way are the other one's."""
        self._slots, self._trying = threading.Semaphore(CALLS_AT_ONCE), False

    def call(self, work: Callable[[], T], patience: float | None = None) -> T:
        """``work()``, if it is done in time (``timeout``, or ``patience`` seconds). Raises FileNotFoundError, or
        `Unavailable`.
        """
        patience = self.timeout if patience is None else patience
        self._enter()
        if not self._slots.acquire(blocking=False):
            self._failed(self.timeout)
            raise Unavailable(f"{self.url}: {CALLS_AT_ONCE} calls hang")
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = work()
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # a client's CancelledError, say, would end whoever asked
                future.set_exception(Unavailable(f"{type(error).__name__}: {error}"))
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
        except (FileNotFoundError, format.Rejected):
            self._succeeded()
            raise
        except FutureTimeout as error:
            self._failed(time.monotonic() - start)
            raise Unavailable(f"{self.url} did not answer in {patience:g} s") from error
        except Exception as error:
            self._failed(time.monotonic() - start)
            raise Unavailable(f"{self.url}: {type(error).__name__}: {error}") from error
        except BaseException:  # an interrupt of who waits says nothing of the remote, and must not keep others out
            with self._lock:
                self._trying = False
            raise
        self._succeeded()
        return result

    def read(self, name: str, check: files.Check | None = None) -> format.Data:
        """The file's bytes. Raises what `call` does, and `Unavailable` for more than ``max_bytes``. On a network share,
        ``check`` is called as by `files.contents`.
        """
        if self._is_share:
            return self.call(lambda: files.read(f"{self.root}/{name}", self.max_bytes, check))
        data = self.read_head(name, self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise Unavailable(f"{name} is larger than {self.max_bytes:,} bytes")
        return data

    def read_head(self, name: str, size: int) -> bytes:
        """The file's first ``size`` bytes, or what there is; no more is kept in memory, whatever is sent. Raises what
        `call` does.
        """

        def work() -> bytes:
            path = f"{self.root}/{name}"
            try:
                return self._first(path, size)
            except FileNotFoundError:
                raise
            except Exception:  # an empty object has no first byte that a server could send
                if self._ask("info", path)["size"]:
                    raise
                return b""

        return self.call(work)

    def _first(self, path: str, size: int) -> bytes:
        if self._is_share:
            return files.read_head(path, size)
        if (stream := _stream(self.fs)) is not None:  # a server may ignore the range it was asked for, and never end
            return self._sync(stream, self.fs, path, size)
        return bytes(self._ask("cat_file", path, start=0, end=size))

    def _ask(self, method: str, *arguments: Any, patience: float | None = None, **options: Any) -> Any:
        """A method of the file system; of one that can be stopped, no longer than the call may take."""
        if getattr(self.fs, "async_impl", False) is True:
            return self._sync(getattr(self.fs, f"_{method}"), *arguments, patience=patience, **options)
        return getattr(self.fs, method)(*arguments, **options)

    def _sync(self, work: Callable[..., Any], *arguments: Any, patience: float | None = None, **options: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self.fs.loop, work, *arguments, timeout=patience or self.timeout, **options)

    @property
    def _is_share(self) -> bool:
        return "file" in self.fs.protocol

    def listing(self) -> dict[str, tuple[int, float]]:
        """Bytes and time of change (epoch seconds; 0: not known) of all files, by name. Raises `Unavailable`.

        A listing comes in pages, so it is given a few times as long as other calls.
        """

        def work() -> dict[str, tuple[int, float]]:
            try:
                found = self._ask("find", self.root, detail=True, patience=_LISTING * self.timeout)
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
            if self._is_share:  # what is half written must not have the name
                files.make_directory(Path(path).parent)
                files.publish(Path(path), data)
            else:
                self._ask("pipe_file", path, data)

        self.call(work)

    def remove(self, name: str) -> None:
        """Remove a file; that it is gone already is no error. Raises `Unavailable`."""

        def work() -> None:
            if self._exists(path := f"{self.root}/{name}"):
                self._ask("rm_file", path)

        try:
            self.call(work)
        except FileNotFoundError:
            pass

    def _exists(self, path: str) -> bool:
        try:
            self._ask("info", path)
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
    whose upload fails stay where they are nearer by. ``beside``: where they are kept nearer by, and what another
    process forgets there is not uploaded.
    """

    def __init__(self, remote: Remote, namespace: Namespace, beside: DiskStore | None = None) -> None:
        self.remote, self.namespace, self._beside = remote, namespace, beside
        self._known: dict[str, int] = {}
        self._damaged: set[str] = set()
        self._unwanted: set[str] = set()
        self._waiting = 0
        self._queued: dict[str, bool] = {}
        """What waits for its upload, and whether it still is to be uploaded."""
        self._stats = StoreStats()
        self._lock = threading.Lock()
        self._uploads: Background[tuple[str, ChunkKV, bytes]] = Background(self._upload)

    def get(self, key: str) -> ChunkKV | None:
        if not _is_key(key) or key in self._unwanted:
            self._missed()
            return None
        try:
            data = self.remote.read(
                self._name(key), lambda read, status: format.check_file(read, status, self.namespace)
            )
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

    def spare_bytes(self) -> int:
        return 0

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        return False

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
            self._queued[key] = True
        self._uploads.add([(key, chunk, b"" if self._beside is None else self._beside.forgettings())])
        return False

    def delete(self, keys: Collection[str]) -> None:
        """Remove entries, those that wait for their upload included; tried again later when the remote is away."""
        with self._lock:
            self._unwanted.update(filter(_is_key, keys))
            for key in keys:
                self._known.pop(key, None)
        self._remove_unwanted()

    def known(self) -> set[str]:
        """The keys that `in` answers for."""
        with self._lock:
            return set(self._known)

    def size(self, key: str) -> int:
        """The bytes of a chunk's file, if `in` answers for it; else 0."""
        return self._known.get(key, 0)

    def let_go(self, keys: Collection[str]) -> None:
        """Another process removed these where they are nearer by. They may be there still, since it may have evicted
        them, but must be asked for, and what waits for its upload is not uploaded.
        """
        with self._lock:
            for key in keys:
                self._known.pop(key, None)
                if key in self._queued:
                    self._queued[key] = False

    def entries(self) -> Iterator[Entry]:
        return iter(())

    def refresh(self) -> bool:
        return False

    changes = 0

    def vanished(self) -> list[str]:
        return []

    def forgettings(self) -> bytes:
        return b""

    def holding(self, keys: Collection[str] = ()) -> AbstractContextManager[None]:
        return nullcontext()  # a remote has no cap

    def room(self) -> int | None:
        return None

    def fitting(self, texts: Sequence[str]) -> int:
        return len(texts)

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

    def _forgotten(self, key: str, then: bytes) -> bool:
        """Whether another process may have forgotten it since ``then``, when it was given to be uploaded."""
        near = self._beside
        if not self._queued.get(key, True):
            return True
        # In the index and not in the folder: removed, and not noticed yet. In neither: evicted by this process.
        return near is not None and not near.holds(key) and (key in near or near.forgettings() != then)

    def _upload(self, task: tuple[str, ChunkKV, bytes]) -> None:
        key, chunk, then = task
        try:
            if key not in self._unwanted and not self._forgotten(key, then):
                data = format.dump(key, chunk, self.namespace)
                self.remote.write(self._name(key), data, again=key in self._damaged)
                with self._lock:
                    self._damaged.discard(key)
                    if self._forgotten(key, then):  # while it was written
                        self._unwanted.add(key)
                    if key not in self._unwanted:
                        self._known[key] = len(data)
        except (OSError, UnicodeEncodeError, MemoryError) as error:
            log.warning("chunk %s was not uploaded: %s", key[:12], error)
            with self._lock:
                self._stats.failed_puts += 1
        finally:
            with self._lock:
                self._waiting -= chunk.nbytes
                self._queued.pop(key, None)
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


def _stream(fs: Any) -> Callable[..., Any] | None:
    """Reads the beginning of a file piece by piece, where the file system is known to send more than it is asked for if
    the server does: ``await stream(fs, path, size)``.
    """
    kinds = {"http": _http_stream, "https": _http_stream, "s3": _s3_stream, "s3a": _s3_stream}
    names = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    found = next((kinds[name] for name in names if name in kinds), None)
    needed = "_call_s3" if found is _s3_stream else "set_session"
    return found if getattr(fs, "async_impl", False) is True and hasattr(fs, needed) else None


async def _http_stream(fs: Any, path: str, size: int) -> bytes:
    session = await fs.set_session()
    options = dict(fs.kwargs)
    headers = {**options.pop("headers", {}), "Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(path), headers=headers, **options) as response:
        fs._raise_not_found_for_status(response, path)
        return await _pieces(response.content.read, size)


async def _s3_stream(fs: Any, path: str, size: int) -> bytes:
    bucket, key, _ = fs.split_path(path)
    found = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}", **fs.req_kw)
    try:
        return await _pieces(found["Body"].read, size)
    finally:
        found["Body"].close()


async def _pieces(read: Callable[[int], Any], size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (piece := await read(min(_PIECE, size - len(data)))):
        data += piece
    return bytes(data)


def _changed(about: Mapping[str, Any]) -> float:
    """When a file was written, as its file system calls that."""
    when = next((about[name] for name in ("mtime", "LastModified", "last_modified", "created") if about.get(name)), 0)
    try:
        return float(when.timestamp() if isinstance(when, datetime) else when)
    except (TypeError, ValueError):
        return 0.0


def _is_key(key: str) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")
