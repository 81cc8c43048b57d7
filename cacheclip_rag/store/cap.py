"""One cap for all processes, models and tenants that keep their files below one folder."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from . import files

log = logging.getLogger("cacheclip_rag")

LOW_WATER = 0.9
"""Eviction goes down to this share of the cap, so that it does not run at every put."""
STALE = 3600.0
"""Seconds after which a temporary file is taken for a crashed process's, and a damaged file is dropped."""
PATIENCE = 10.0
"""Seconds for another process to finish making room."""

_AT_ONCE = 1.0  # seconds, or as long as counting took, of removing more than is needed
_NOTE = len(b"%020d %020d\n" % (0, 0))
_CHUNK = re.compile(r"[0-9a-f]{64}\.safetensors")
_FOLDER = re.compile(r"[0-9a-f]{32}")


class Found(NamedTuple):
    """A file of the store, ``namespace/name``. ``used``: when it was last used (epoch seconds), to the minute."""

    namespace: str
    name: str
    nbytes: int
    used: float
    garbage: bool
    """Left by a crash, or set aside as damaged; never a chunk."""

    @property
    def key(self) -> str:
        """A chunk's."""
        return self.name[:64]


class Held:
    """Chunks that an ingestion under way counts on, in all namespaces of one place: this process evicts none of them.

    Nothing is held before `begin` and after the last `end`. Thread-safe.
    """

    def __init__(self) -> None:
        self._sizes: dict[tuple[str, str], int] = {}
        self._depth = self.nbytes = 0
        self._lock = threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self._depth += 1

    def end(self) -> None:
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._sizes.clear()
                self.nbytes = 0

    @property
    def active(self) -> bool:
        return self._depth > 0

    def add(self, namespace: str, key: str, nbytes: int) -> None:
        with self._lock:
            if self._depth:
                self.nbytes += nbytes - self._sizes.get((namespace, key), 0)
                self._sizes[namespace, key] = nbytes

    def drop(self, namespace: str, key: str) -> None:
        with self._lock:
            self.nbytes -= self._sizes.pop((namespace, key), 0)

    def __contains__(self, place: tuple[str, str]) -> bool:
        return place in self._sizes


LastUsed = Callable[[Found], "float | None"]
"""When a file was last used (epoch seconds), for one who may know better than the file; None: it must stay."""


class SharedCap:
    """Keeps the files below ``folder`` within ``cap`` bytes, whoever writes them.

    A file comes into being at its full size, and takes its name, while its process is `alone`; so whoever counts the
    files meanwhile counts what others are writing, too. What was counted is remembered in a note that all processes
    share and that may only err upwards: when it says that the cap is reached, the files are counted anew. So a
    reservation is a few system calls, a crash or a deletion costs one count, and nothing is lost with the note or
    the lock file. Where the file system knows no locks, each process still keeps the cap by counting, and two that
    write at once may exceed it by what both write.
    """

    def __init__(self, folder: Path, cap: int) -> None:
        self.folder, self.cap = folder, cap
        self._note = folder / ".usage"
        self._trusted = True
        self._threads = threading.Lock()

    @contextmanager
    def alone(self, patience: float | None = None) -> Iterator[None]:
        """No other process or thread makes or renames files of the store meanwhile; they may be removed.

        Raises TimeoutError when another one keeps everybody waiting for ``patience`` seconds.
        """
        patience = PATIENCE if patience is None else patience
        if not self._threads.acquire(timeout=patience):
            raise TimeoutError("another thread keeps the store busy")
        try:
            try:
                files.status(self.folder)
                lock = files.lock(self.folder / ".lock", patience)
                lock.__enter__()
            except TimeoutError:
                raise
            except (OSError, NotImplementedError):  # read-only, full, or a file system without locks
                yield
                return
            try:
                yield
            finally:
                lock.__exit__(None, None, None)
        finally:
            self._threads.release()

    def make_room(self, size: int, last_used: LastUsed) -> list[Found] | None:
        """Take note of ``size`` bytes more, for a file that the caller makes while it is still `alone`, and make room
        for them; what had to go, least recently used first, or None when there is no room.
        """
        total, gone = self._noted(), list[Found]()
        if total is None or total + size > self.cap:
            start = time.monotonic()
            found = list(self.scan())
            total = sum(file.nbytes for file in found)
            if total + size > self.cap:
                # Others are waiting; but what is removed beyond what is needed spares them the next count.
                until = time.monotonic() + max(time.monotonic() - start, _AT_ONCE)
                excess = total + size - self.cap
                gone = self._free(found, excess, last_used, excess + self.cap - int(self.cap * LOW_WATER), until)
                total -= sum(file.nbytes for file in gone)
        fits = total + size <= self.cap
        self._write_down(total + size if fits else total)
        return gone if fits else None

    def spare_bytes(self) -> int:
        """The bytes that can come with nothing removed, now or by the next file, which makes more room than it needs.

        By the note; 0 where it says nothing.
        """
        total = self._noted()
        return 0 if total is None else max(0, int(self.cap * LOW_WATER) - total)

    def free(self, size: int, last_used: LastUsed) -> list[Found]:
        """Remove the least recently used files until ``size`` bytes are freed, whatever the cap says.

        Raises TimeoutError when another process keeps everybody waiting.
        """
        with self.alone():
            return self._free(list(self.scan()), size, last_used)

    def count(self) -> int:
        """Count what is there, in bytes, and remove what crashes left behind; for the opening of a store."""
        with self.alone():
            total = 0
            for file in self.scan():
                if not (file.garbage and time.time() - file.used > STALE and self._remove(file)):
                    total += file.nbytes
            if self._noted() != total:
                self._write_down(total)
            return total

    def scan(self) -> Iterator[Found]:
        """All files of all namespaces, damaged and temporary ones included; nothing that has another kind of name."""
        for folder in namespaces(self.folder):
            try:
                for entry in files.listing(folder):
                    garbage = _is_garbage(entry.name)
                    if not garbage and not _CHUNK.fullmatch(entry.name):
                        continue
                    try:
                        if entry.is_file(follow_symlinks=False):
                            status = entry.stat(follow_symlinks=False)
                            yield Found(folder.name, entry.name, status.st_size, status.st_mtime, garbage)
                    except OSError:  # evicted meanwhile
                        continue
            except OSError:
                continue

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _free(
        self, found: list[Found], size: int, last_used: LastUsed, gladly: int = 0, until: float = 0.0
    ) -> list[Found]:
        """Remove ``size`` bytes, and ``gladly`` so many, ``until`` that moment of `time.monotonic`."""
        now, freed, gone = time.time(), 0, list[Found]()
        candidates = list[tuple[bool, float, str, Found]]()
        for file in found:
            used = last_used(file)
            # A young temporary file is another process's chunk in the making.
            if used is not None and not (file.name.startswith(files.TEMPORARY) and now - file.used < STALE):
                candidates.append((not file.garbage, used, file.name, file))
        if gladly and sum(candidate[3].nbytes for candidate in candidates) < size:
            return gone  # a chunk that does not fit anyway costs others nothing
        for *_, file in sorted(candidates, key=lambda candidate: candidate[:3]):
            if freed >= size and (freed >= gladly or time.monotonic() > until):
                break
            if self._remove(file):
                freed += file.nbytes
                gone.append(file)
        return gone

    def _remove(self, file: Found) -> bool:
        try:
            files.remove(self.folder / file.namespace / file.name)
        except OSError as error:
            log.warning("could not delete %s: %s", file.name[:16], error.strerror)
            return False
        return True

    def _noted(self) -> int | None:
        """What the note says, in bytes; None when it is missing, torn, or could not be written last time."""
        try:
            one, two = files.read_head(self._note, _NOTE).split()
            return int(one) if one == two and self._trusted else None
        except (OSError, ValueError):
            return None

    def _write_down(self, total: int) -> None:
        try:
            files.overwrite(self._note, b"%020d %020d\n" % (total, total))
            self._trusted = True
        except OSError:
            self._trusted = False
            try:
                files.remove(self._note)  # what it says is too little: others must not believe it
            except OSError:
                pass


def namespaces(folder: Path) -> list[Path]:
    """The folders of all namespaces below a store's folder, also those that were moved elsewhere and linked."""
    try:
        found = [entry for entry in files.listing(folder) if _FOLDER.fullmatch(entry.name)]
        return sorted(folder / entry.name for entry in found if entry.is_dir())
    except OSError:
        return []


def hidden(folder: Path, namespace: str = "") -> list[str]:
    """What may hold chunks below a store's folder, in the namespaces whose names begin so, and cannot be looked into,
    each with the reason. Raises OSError where the folder itself cannot be.
    """
    found = list[str]()
    for entry in files.listing(folder):
        if not _FOLDER.fullmatch(entry.name) or not entry.name.startswith(namespace):
            continue
        if entry.is_dir():
            found += _hidden_in(folder / entry.name)
        elif entry.is_symlink():
            found.append(f"{entry.name} is a link that leads to no folder: is a disk not mounted?")
    return found


def _hidden_in(folder: Path) -> list[str]:
    try:
        entries = list(files.listing(folder))
    except OSError as error:
        return [f"{folder.name} cannot be read: {error.strerror or error}"]
    mine = [entry for entry in entries if _is_garbage(entry.name) or _CHUNK.fullmatch(entry.name)]
    links = [f"{folder.name}/{entry.name} is a link" for entry in mine if entry.is_symlink()]
    return links + [f"{folder.name}/{entry.name} is a folder" for entry in mine if entry.is_dir(follow_symlinks=False)]


def _is_garbage(name: str) -> bool:
    return name.startswith(files.TEMPORARY) or name.endswith(".bad")
