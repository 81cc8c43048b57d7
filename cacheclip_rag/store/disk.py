"""Chunk KV in files: immutable, named by digest, published atomically, verified when read."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..chunks import ChunkKV, Namespace
from ..errors import StoreError
from . import files, format
from .base import Entry, StoreStats

log = logging.getLogger("cacheclip_rag")

_STAMP_EVERY = 60.0  # seconds between two "last used" stamps of a file
_STALE = 3600.0  # seconds after which temporary files are taken for a crashed process's, and damaged ones are dropped
_TICK = 2_000_000_000  # nanoseconds between two times of change that a file system tells apart, at worst
_LOW_WATER = 0.9  # eviction goes down to this share of the cap, so that it does not run at every put


@dataclass
class _Known:
    text: str
    nbytes: int
    used: float
    stamped: float
    """When the file last said so: other processes see this."""


class DiskStore:
    """A `ChunkStore` in ``folder/<namespace digest>/<key>.safetensors``, at most ``cap`` bytes for this namespace.

    The files are the truth: the index in memory is rebuilt from their headers on opening and follows the folder when
    another process changes it. A file that is damaged, foreign or unreadable is a miss, and a damaged one is set aside
    as ``*.bad``. A folder that cannot be written still serves what it holds.
    """

    def __init__(self, folder: str | Path, namespace: Namespace, cap: int, *, sync: bool = True) -> None:
        """Raises `StoreError` when ``folder`` is no folder and cannot be made one."""
        self.namespace, self.cap, self.sync = namespace, cap, sync
        self.path = Path(folder).expanduser() / namespace.digest[:32]
        self._index: dict[str, _Known] = {}
        self._stats = StoreStats()
        self._lock, self._writing = threading.RLock(), threading.Lock()
        self._seen = -1
        self.writable = True
        try:
            files.make_directory(self.path)
            if not (self.path / "namespace.json").exists():
                files.publish(self.path / "namespace.json", json.dumps(namespace.fields, indent=1).encode(), sync)
        except OSError as error:
            if not os.path.isdir(self.path) and error.errno not in (
                errno.EROFS,
                errno.EACCES,
                errno.ENOSPC,
                errno.EDQUOT,
            ):
                raise StoreError(f"{folder} cannot be used as a chunk store: {error.strerror or error}") from error
            self.writable = False
            log.warning("chunk store %s is not writable (%s): nothing new will be kept", folder, error.strerror)
        self._sweep()
        self.refresh()

    def refresh(self) -> bool:
        """Take note of what other processes added or removed; one `stat` call when nothing changed."""
        with self._lock:
            try:
                changed = self.path.stat().st_mtime_ns
                if changed == self._seen:
                    return False
                listed = time.time_ns()
                found = {entry.name[: -len(format.SUFFIX)]: entry for entry in files.listing(self.path)}
            except OSError:
                return False
            found = {key: entry for key, entry in found.items() if _is_key(key) and entry.name == key + format.SUFFIX}
            gone, new = set(self._index) - set(found), set(found) - set(self._index)
            for key in gone:
                del self._index[key]
            adopted = [key for key in new if self._adopt(key)]
            # A folder's time of change has ticks: what changes in the tick of a listing is seen by the next one only.
            self._seen = changed if listed - changed > _TICK else -1
            return bool(gone or adopted)

    def get(self, key: str) -> ChunkKV | None:
        if key not in self._index:
            self._stats.misses += 1
            return None
        try:
            chunk = format.load(files.read(self._file(key)), key, self.namespace)
        except format.Rejected as reason:
            self._set_aside(key, str(reason))
        except FileNotFoundError:
            self._forget(key, "vanished")
        except (OSError, MemoryError):
            self._stats.reject("unreadable")
        else:
            self._stats.hits += 1
            self._stamp(key)
            return chunk
        self._stats.misses += 1
        return None

    def put(self, key: str, chunk: ChunkKV) -> bool:
        if not _is_key(key):
            return self._not_kept("its key is no sha256")
        try:
            data = format.dump(key, chunk, self.namespace)
        except UnicodeEncodeError:
            return self._not_kept("text is not valid Unicode")
        with self._writing:  # one at a time, so that the cap holds
            return self._put(key, data)

    def _put(self, key: str, data: bytes) -> bool:
        if self._file(key).exists() and self._adopt(key):
            return True
        if len(data) > self.cap:
            return self._not_kept(f"larger than the store's cap of {self.cap:,} bytes")
        self._make_room(len(data))
        for attempt in range(2):
            try:
                files.publish(self._file(key), data, self.sync)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and attempt == 0 and self._index:
                    self._evict(len(data))  # once: a disk that others fill is not ours to clear
                    continue
                return self._not_kept(error.strerror or str(error))
            return self._adopt(key)
        return False

    def delete(self, keys: Collection[str]) -> None:
        for key in keys:
            try:
                files.remove(self._file(key))
            except OSError as error:
                log.warning("could not delete stored chunk %s: %s", key[:12], error)
                continue
            self._forget(key)

    def entries(self) -> Iterator[Entry]:
        self.refresh()
        with self._lock:
            snapshot = list(self._index.items())
        return (Entry(key, known.text, known.nbytes) for key, known in snapshot)

    def stats(self) -> StoreStats:
        with self._lock:
            return replace(
                self._stats,
                entries=len(self._index),
                nbytes=sum(known.nbytes for known in self._index.values()),
                rejected=dict(self._stats.rejected),
            )

    def __contains__(self, key: object) -> bool:
        return key in self._index

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{format.SUFFIX}"

    def _adopt(self, key: str) -> bool:
        """Take a file into the index, by its header; False when it is none of ours."""
        try:
            text, stat = self._head(key)["text"], self._file(key).stat()
        except format.Rejected as reason:
            self._set_aside(key, str(reason))
        except OSError:
            self._stats.reject("unreadable")
        else:
            with self._lock:
                self._index[key] = _Known(text, stat.st_size, stat.st_mtime, stat.st_mtime)
            return True
        return False

    def _head(self, key: str) -> dict[str, str]:
        head = files.read_head(self._file(key), 64 << 10)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 + length <= 8 + format.MAX_HEADER:
            head = files.read_head(self._file(key), 8 + length)
        metadata = format.header(head)
        if metadata["key"] != key or metadata["namespace"] != self.namespace.json:
            raise format.Rejected("other key or model")
        return metadata

    def _forget(self, key: str, reason: str | None = None) -> None:
        with self._lock:
            self._index.pop(key, None)
            if reason:
                self._stats.reject(reason)

    def _set_aside(self, key: str, reason: str) -> None:
        log.warning("stored chunk %s is not served: %s", key[:12], reason)
        self._forget(key, reason)
        try:
            files.rename(self._file(key), self._file(key).with_suffix(".bad"))
        except OSError:
            pass

    def _not_kept(self, reason: str) -> bool:
        with self._lock:
            self._stats.failed_puts += 1
        log.warning("chunk KV could not be kept: %s", reason)
        return False

    def _stamp(self, key: str) -> None:
        known = self._index.get(key)
        if known is None:
            return
        known.used = time.time()
        if known.used - known.stamped > _STAMP_EVERY:
            known.stamped = known.used
            try:
                files.touch(self._file(key))
            except OSError:
                pass

    def _make_room(self, size: int) -> None:
        self.refresh()
        with self._lock:
            total = sum(known.nbytes for known in self._index.values())
        if total + size > self.cap:
            self._evict(total + size - int(self.cap * _LOW_WATER))

    def _evict(self, size: int) -> None:
        """Delete the least recently used chunks until ``size`` bytes are freed. Readers keep what they opened."""
        with self._lock:
            oldest = sorted(self._index.items(), key=lambda item: item[1].used)
        freed = 0
        for key, known in oldest:
            if freed >= size:
                break
            self.delete([key])
            if key not in self._index:
                freed += known.nbytes
                self._stats.evicted += 1

    def _sweep(self) -> None:
        """Remove temporary files that a crashed process left, and files that were set aside."""
        try:
            for entry in files.listing(self.path):
                ours = entry.name.startswith(files.TEMPORARY) or entry.name.endswith(".bad")
                ours = ours and entry.is_file(follow_symlinks=False)
                if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > _STALE:
                    files.remove(Path(entry.path))
        except OSError:
            pass


def _is_key(key: str) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")
