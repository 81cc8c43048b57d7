"""Chunk KV in files: immutable, named by digest, published atomically, verified when read."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..chunks import ChunkKV, Namespace
from ..errors import StoreError
from . import files, format
from .base import Entry, StoreStats
from .cap import Found, Held, SharedCap
from .forgettings import Forgettings
from .memory import count_fitting

log = logging.getLogger("cacheclip_rag")

FULL = "the store is full, and room could only be made by evicting what is being stored with it (disk_bytes)"
_STAMP_EVERY = 60.0  # seconds between two "last used" stamps of a file
_BRIEFLY = 1.0  # seconds to wait for other processes before a damaged file is left where it is
_TICK = 2_000_000_000  # nanoseconds between two times of change that a file system tells apart, at worst


@dataclass
class _Known:
    text: str
    context: tuple[str, ...]
    in_sequence: bool
    nbytes: int
    used: float
    stamped: float
    """When the file last said so: other processes see this."""


class DiskStore:
    """A `ChunkStore` in ``folder/<namespace digest>/<key>.safetensors``; all below ``folder`` is at most ``cap`` bytes.

    The files are the truth: the index in memory is rebuilt from their headers on opening and follows the folder when
    another process changes it. A file that is damaged, foreign or unreadable is a miss, and a damaged one is set aside
    as ``*.bad``. A folder that cannot be written still serves what it holds.
    """

    def __init__(
        self, folder: str | Path, namespace: Namespace, cap: int, *, sync: bool = True, held: Held | None = None
    ) -> None:
        """``sync``: what was kept survives a power cut too, not only the end of the process. ``held``: what `holding`
        holds, in this store and in those that it shares a place with.

        Raises `StoreError` when ``folder`` is no folder and cannot be made one.
        """
        self.namespace, self.cap, self.sync = namespace, cap, sync
        self.folder = Path(folder).expanduser()
        self.path = self.folder / namespace.digest[:32]
        self._prefix = f"{self.path}/"
        self._index: dict[str, _Known] = {}
        self._reading: Counter[str] = Counter()
        self._vanished: set[str] = set()
        self._stats = StoreStats()
        self._lock, self._writing, self._refreshing = threading.RLock(), threading.Lock(), threading.Lock()
        self._seen = -1
        self.changes = 0
        self._shared = SharedCap(self.folder, cap)
        self._forgettings = Forgettings(self.folder)
        self._held = Held() if held is None else held
        self.writable = True
        try:
            self._make_folder()
        except OSError as error:
            if not _is_folder(self.path) and error.errno not in (
                errno.EROFS,
                errno.EACCES,
                errno.ENOSPC,
                errno.EDQUOT,
            ):
                raise StoreError(f"{folder} cannot be used as a chunk store: {error.strerror or error}") from error
            self.writable = False
            log.warning("chunk store %s is not writable (%s): nothing new will be kept", folder, error.strerror)
        try:
            self._shared.count()
        except TimeoutError:
            log.warning("chunk store %s is being cleared up by another process", folder)
        self.refresh()

    def refresh(self) -> bool:
        """Take note of what other processes added or removed; one `stat` call when nothing changed."""
        with self._refreshing:
            try:
                changed = files.changed(self.path)
                if changed == self._seen:
                    return False
            except FileNotFoundError:  # another process cleared the store
                changed = -1
            except OSError:
                return False
            with self._lock:  # before the listing, which may miss what is put meanwhile
                before = set(self._index)
            listed = time.time_ns()
            try:
                found = self._listed()
            except OSError:
                return False
            gone, new = before - found, found - before
            with self._lock:
                # What this process deleted or evicted since the snapshot has left the index already.
                self._vanished |= {key for key in gone if self._index.pop(key, None) is not None}
            for key in gone:
                self._held.drop(self.path.name, key)
            adopted = [key for key in new if self._adopt(key)]
            # A folder's time of change has ticks: what changes in the tick of a listing is seen by the next one only.
            self._seen = changed if listed - changed > _TICK else -1
            self.changes += bool(gone or adopted)
            return bool(gone or adopted)

    def vanished(self) -> list[str]:
        with self._lock:
            gone = list(self._vanished)
            self._vanished.clear()
            return gone

    def forgettings(self) -> bytes:
        return self._forgettings.last()

    def get(self, key: str) -> ChunkKV | None:
        if key not in self._index:
            with self._lock:
                self._stats.misses += 1
            return None
        chunk = None
        with self._lock:
            self._reading[key] += 1
        try:
            chunk = self._load(key)
        finally:
            with self._lock:
                self._reading[key] -= 1
                if not self._reading[key]:
                    del self._reading[key]
                self._stats.hits += chunk is not None
                self._stats.misses += chunk is None
        return chunk

    def _load(self, key: str) -> ChunkKV | None:
        self.touch(key)  # before the file is opened: what is being read is not what was used longest ago
        status: os.stat_result | None = None

        def check(read: files.Read, opened: os.stat_result) -> None:
            nonlocal status
            status = opened
            self._check(read, opened)

        try:
            data, status = files.contents(self._name(key), self.cap, check)
            return format.load(data, key, self.namespace)
        except format.Rejected as reason:
            self._set_aside(key, str(reason), status)
        except FileNotFoundError:
            self._note_vanished(key)
        except (OSError, MemoryError):
            self._reject("unreadable")
        return None

    def touch(self, key: str) -> None:
        """Note that the chunk was used, though it may have been served by a nearer tier."""
        known = self._index.get(key)
        if known is None:
            return
        known.used = time.time()
        if known.used - known.stamped > _STAMP_EVERY:
            known.stamped = known.used
            try:
                files.touch(self._file(key))
            except FileNotFoundError:
                self._note_vanished(key)
            except OSError:
                pass

    def size(self, key: str) -> int:
        """The bytes of a chunk's file, as far as it is known; else 0."""
        known = self._index.get(key)
        return 0 if known is None else known.nbytes

    def holds(self, key: str) -> bool:
        """Whether the file is there now, whatever was noted."""
        return _is_key(key) and _exists(self._file(key))

    def put(self, key: str, chunk: ChunkKV) -> bool:
        return self._pack_and_put(key, chunk, spare=False)

    def put_spare(self, key: str, chunk: ChunkKV) -> bool:
        return self._pack_and_put(key, chunk, spare=True)

    def _pack_and_put(self, key: str, chunk: ChunkKV, *, spare: bool) -> bool:
        if not _is_key(key):
            return self._not_kept("its key is no sha256")
        try:
            data = format.dump(key, chunk, self.namespace)
        except UnicodeEncodeError:
            return self._not_kept("text is not valid Unicode")
        except MemoryError:
            return self._not_kept("out of memory")
        with self._writing:
            return self._put(key, data, spare)

    def spare_bytes(self) -> int:
        return self._shared.spare_bytes()

    def _put(self, key: str, data: bytes, spare: bool) -> bool:
        path = self._file(key)
        if _exists(path) and self._adopt(key):
            if not spare:
                self._hold([key])
            return True
        if len(data) > self.cap:
            return self._not_kept(f"larger than the store's cap of {self.cap:,} bytes")
        try:
            for attempt in range(2):
                try:
                    if not self._publish(path, data, spare):
                        if spare:
                            return False
                        held = self._held.active
                        return self._not_kept(FULL if held else "no room could be made")
                    kept = self._adopt(key)
                    if not spare:
                        self._hold([key])
                        self.touch(key)
                    return kept
                except FileNotFoundError:  # the folder: another process cleared the store
                    if attempt:
                        raise
                    self._make_folder()
                except OSError as error:  # once: a disk that others fill is not ours to clear
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                    if attempt or spare or not full or not self._evict(len(data)):
                        raise
        except TimeoutError:
            return self._not_kept("another process keeps the store busy")
        except OSError as error:
            return self._not_kept(error.strerror or str(error))
        return False

    def _publish(self, path: Path, data: bytes, spare: bool) -> bool:
        """Write the file within the cap of all processes; False when there is no room. Raises OSError."""
        with self._shared.alone():
            if spare and len(data) > self._shared.spare_bytes():
                return False
            gone = self._shared.make_room(len(data), (lambda file: None) if spare else self._last_used)
            self._note_evicted(gone or ())
            if gone is None:
                return False
            temporary = files.reserve(path, len(data))
        try:
            files.fill(temporary, data, self.sync)  # others may write meanwhile
            with self._shared.alone():
                if spare:
                    files.touch(temporary, 0.0)
                files.rename(temporary, path)
        except BaseException:
            files.discard(temporary)
            raise
        if self.sync:
            files.sync_folder(self.path)
        return True

    @contextmanager
    def holding(self, keys: Collection[str] = ()) -> Iterator[None]:
        self._held.begin()
        try:
            self._hold(keys)
            yield
        finally:
            self._held.end()

    def room(self) -> int | None:
        return max(self.cap - self._held.nbytes, 0) if self._held.active else None

    def fitting(self, texts: Sequence[str]) -> int:
        if not self._held.active:
            return len(texts)
        with self._lock:
            kept = [(len(known.text), known.nbytes) for known in self._index.values() if not known.context]
        return count_fitting(texts, self.room(), kept)

    def _hold(self, keys: Collection[str]) -> None:
        for key in keys:
            if (known := self._index.get(key)) is not None:
                self._held.add(self.path.name, key, known.nbytes)

    def delete(self, keys: Collection[str]) -> None:
        for key in filter(_is_key, keys):
            try:
                files.remove(self._file(key))
                files.remove(self._file(key).with_suffix(".bad"))
            except OSError as error:
                log.warning("could not delete stored chunk %s: %s", key[:12], error)
                continue
            self._held.drop(self.path.name, key)
            with self._lock:
                self._index.pop(key, None)
                self._vanished.discard(key)
        if self.sync and keys:
            try:
                files.sync_folder(self.path)  # or a power cut brings them back
            except OSError as error:
                log.warning("what was deleted may come back with a power cut: %s", error)

    def entries(self) -> Iterator[Entry]:
        self.refresh()
        with self._lock:
            snapshot = sorted(self._index.items(), key=lambda item: item[1].used)
        return (Entry(key, known.text, known.nbytes, known.context, known.in_sequence) for key, known in snapshot)

    def stats(self) -> StoreStats:
        with self._lock:
            stats, known = replace(self._stats, rejected=dict(self._stats.rejected)), list(self._index.values())
        stats.entries, stats.fused = len(known), sum(bool(one.context) for one in known)
        stats.nbytes = stats.disk_bytes = sum(one.nbytes for one in known)
        return stats

    def __contains__(self, key: object) -> bool:
        return key in self._index

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _file(self, key: str) -> Path:
        return self.path / f"{key}{format.SUFFIX}"

    def _name(self, key: str) -> str:
        """`_file`, where there is no time to lose: to join a `Path` takes as long as to open a file."""
        return f"{self._prefix}{key}{format.SUFFIX}"

    def _check(self, read: files.Read, status: os.stat_result) -> None:
        format.check_file(read, status, self.namespace)

    def _listed(self) -> set[str]:
        """Keys of the files that are there. Raises OSError."""
        try:
            names = [entry.name for entry in files.listing(self.path)]
        except FileNotFoundError:
            return set()
        return {key for name in names if name == (key := name[:64]) + format.SUFFIX and _is_key(key)}

    def _make_folder(self) -> None:
        files.make_directory(self.folder)
        files.make_directory(self.path)
        if not _exists(self.path / "namespace.json"):
            described = json.dumps(json.loads(self.namespace.json), indent=1)
            files.publish(self.path / "namespace.json", described.encode(), self.sync)

    def _adopt(self, key: str) -> bool:
        """Take a file into the index, by its header; False when it is none of ours."""
        status: os.stat_result | None = None
        try:
            status = files.status(self._name(key))
            head = self._head(key)
            text, context = head["text"], format.context(head)
        except format.Rejected as reason:
            self._set_aside(key, str(reason), status)
        except FileNotFoundError:
            pass  # evicted meanwhile
        except OSError:
            self._reject("unreadable")
        else:
            with self._lock:
                self._index[key] = _Known(
                    text, context, "joint" in head, status.st_size, status.st_mtime, status.st_mtime
                )
                self._vanished.discard(key)
            return True
        return False

    def _head(self, key: str) -> dict[str, str]:
        metadata: dict[str, str] = format.read_fields(partial(files.read_head, self._name(key)))["__metadata__"]
        if metadata["key"] != key or metadata["namespace"] != self.namespace.json:
            raise format.Rejected("other key or model")
        return metadata

    def _note_vanished(self, key: str) -> None:
        """The file is gone. Whoever removed it may have forgotten the text, so it must not only be missed."""
        self._held.drop(self.path.name, key)
        with self._lock:
            # What this process removed has left the index, or is about to (`_note_evicted`).
            if self._index.pop(key, None) is not None:
                self._vanished.add(key)
                self._stats.reject("vanished")

    def _forget(self, key: str, reason: str | None = None) -> None:
        with self._lock:
            self._index.pop(key, None)
        if reason:
            self._reject(reason)

    def _reject(self, reason: str) -> None:
        with self._lock:
            self._stats.reject(reason)

    def _set_aside(self, key: str, reason: str, seen: os.stat_result | None) -> None:
        """Take a damaged file out of the way, unless another process has replaced it since it was ``seen``."""
        log.warning("stored chunk %s is not served: %s", key[:12], reason)
        self._forget(key, reason)
        path, bad = self._file(key), self._file(key).with_suffix(".bad")
        try:
            with self._shared.alone(_BRIEFLY):  # it is a reader who waits
                now = files.status(path)
                if seen is None or (now.st_dev, now.st_ino) != (seen.st_dev, seen.st_ino):
                    return
                files.rename(path, bad)
                # A file that took the other's place, and its number with it, is good: then it goes back.
                format.load(files.read(bad, self.cap, self._check), key, self.namespace)
                files.rename(bad, path)
        except (format.Rejected, OSError, MemoryError):
            pass

    def _not_kept(self, reason: str) -> bool:
        with self._lock:
            self._stats.failed_puts += 1
        log.warning("chunk KV could not be kept: %s", reason)
        return False

    def _evict(self, size: int) -> bool:
        """Free ``size`` bytes, the least recently used chunks first."""
        gone = self._shared.free(size, self._last_used)
        self._note_evicted(gone)
        return bool(gone)

    def _last_used(self, file: Found) -> float | None:
        """When a file was last used, to the moment where it was by this process; None for what is being read."""
        if (file.namespace, file.key) in self._held:
            return None
        with self._lock:
            mine = file.namespace == self.path.name
            if mine and file.key in self._reading:
                return None
            known = self._index.get(file.key) if mine else None
            return file.used if known is None else max(file.used, known.used)

    def _note_evicted(self, gone: Collection[Found]) -> None:
        with self._lock:
            for file in gone:
                self._stats.evicted += not file.garbage
                if file.namespace == self.path.name:
                    self._index.pop(file.key, None)
                    self._vanished.discard(file.key)


def _exists(path: Path) -> bool:
    try:
        files.status(path)
    except OSError:
        return False
    return True


def _is_folder(path: Path) -> bool:
    try:
        next(files.listing(path), None)
    except NotADirectoryError:
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def _is_key(key: str) -> bool:
    return len(key) == 64 and set(key) <= set("0123456789abcdef")
