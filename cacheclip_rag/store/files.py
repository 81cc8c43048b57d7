"""All file access of the store, in one module whose ``os`` tests can replace to make system calls fail.

Every function raises OSError for what the file system refuses, and nothing else.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TEMPORARY = ".tmp-"
# A link or a pipe under a chunk's name was not put there by us: one leads elsewhere, the other never ends.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 1 << 30  # bytes read at a time, at most
_POLL = 0.005  # seconds between two tries for a lock

Read = Callable[[int, int], bytes]
"""Gives so many bytes of a file from an offset on, or what there is of them."""
Check = Callable[[Read, os.stat_result], None]


def read(path: Path | str, limit: int | None = None, check: Check | None = None) -> memoryview:
    """The whole file, as `contents` reads it."""
    return contents(path, limit, check)[0]


def contents(
    path: Path | str, limit: int | None = None, check: Check | None = None
) -> tuple[memoryview, os.stat_result]:
    """The whole file, in writable memory of its own, and what was opened. Plain reads, no memory map: a file cut short
    under a map kills the process.

    A file of more than ``limit`` bytes is an OSError (EFBIG), as is one that grows meanwhile, and anything but a
    regular file. ``check(read, status)`` is called before and raises what it likes for a file that is not worth the
    memory.
    """
    descriptor, status = _open(path)
    try:
        size = status.st_size
        if limit is not None and size > limit:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        if check is not None:
            check(lambda count, offset: _some(descriptor, min(count, size), offset), status)
            os.lseek(descriptor, 0, os.SEEK_SET)
        # Memory that nobody has filled with zeros first, and that tensors can lie in without another copy. One byte
        # more than is wanted shows without another call whether the file has grown.
        whole, length = np.empty(size + 1, np.uint8).data, 0
        while length < size and (count := _read_into(descriptor, whole[length : length + _PIECE])):
            length += count
        if length > size:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
        return whole[:length], status
    finally:
        os.close(descriptor)


def read_head(path: Path | str, size: int) -> bytes:
    """The first ``size`` bytes, or what there is."""
    descriptor, _ = _open(path)
    try:
        return _some(descriptor, size, 0)
    finally:
        os.close(descriptor)


def publish(path: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """Write ``data`` so that a reader sees no file or the whole file, also after the process is killed.

    ``sync`` makes it survive a power cut as well. Raises OSError; the temporary file is gone then.
    """
    temporary = reserve(path, len(data))
    try:
        fill(temporary, data, sync)
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise
    if sync:
        sync_folder(path.parent)


def reserve(path: Path, size: int) -> Path:
    """A temporary file beside ``path``, of ``size`` bytes from the start: who counts the files counts all of it.

    Raises OSError; there is no file then.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL, 0o600)
    try:
        try:
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    except BaseException:
        discard(temporary)
        raise
    return temporary


def fill(temporary: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """Write what a reserved file is for; with ``sync`` it is on the disk then. The file stays when this fails."""
    descriptor = os.open(temporary, os.O_WRONLY | _CAREFUL)
    try:
        _write(descriptor, data)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(temporary: Path) -> None:
    """Remove a reserved file after a failure. If that fails too it is swept later: what went wrong first counts."""
    try:
        os.unlink(temporary)
    except OSError:
        pass


def mark(folder: Path, names: Iterable[str]) -> None:
    """Make empty files, which say by being there all they say, so that they survive a power cut."""
    for name in names:
        os.close(os.open(folder / name, os.O_WRONLY | os.O_CREAT | _CAREFUL, 0o600))
    sync_folder(folder)


def overwrite(path: Path, data: bytes) -> None:
    """Write a small file in place. A reader may see a part of it: for notes that are checked and can be lost.

    A file that has another name as well is somebody else's, who may not want it overwritten: it loses this name.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | _CAREFUL, 0o600)
    try:
        if os.fstat(descriptor).st_nlink > 1:
            os.close(descriptor)
            descriptor = -1
            os.unlink(path)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL, 0o600)
        _write(descriptor, data)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def lock(path: Path, patience: float) -> AbstractContextManager[object]:
    """Hold ``path`` against all other processes and threads; entering raises TimeoutError after ``patience`` seconds.

    The lock goes with the process that holds it, however that ends.
    """
    if fcntl is None:
        return FileLock(path, timeout=patience, mode=0o600, thread_local=False, poll_interval=_POLL)
    return _flock(path, patience)


@contextmanager
def _flock(path: Path, patience: float) -> Iterator[None]:
    """What `FileLock` does, and keeps out whom that keeps out, but touches nothing of the file: `FileLock` cuts it to
    nothing and changes its mode, and in a folder that others may write to it can be a hard link to anything.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _CAREFUL, 0o600)
    try:
        until = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= until:
                    raise TimeoutError(errno.ETIMEDOUT, "held by another process", str(path)) from None
                time.sleep(_POLL)
        yield
    finally:
        try:
            os.close(descriptor)
        except OSError:  # the lock is gone with the descriptor all the same
            pass


def make_directory(path: Path) -> None:
    """A folder for its owner only, and so are those above it that have to be made. One that exists stays as it is."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise
        return
    except FileNotFoundError:
        if path.parent == path:
            raise
        make_directory(path.parent)
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:  # by another process
            return make_directory(path)
    try:
        sync_folder(path.parent)  # what is synced in a folder is lost with the folder
    except OSError:  # it may be another's, who lets nobody look
        pass


def remove(path: Path) -> None:
    """Remove a file; that it is gone already is no error."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove_directory(path: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(path)


def rename(path: Path, target: Path) -> None:
    os.replace(path, target)


def touch(path: Path, when: float | None = None) -> None:
    """Stamp a file as last used then (epoch seconds), or now."""
    os.utime(path, None if when is None else (when, when), follow_symlinks=False)


def status(path: Path | str) -> os.stat_result:
    """Of the thing itself, not of what a link points to."""
    return os.stat(path, follow_symlinks=False)


def is_absent(path: Path) -> bool:
    """Whether there is nothing at all under this name."""
    try:
        status(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def changed(path: Path) -> int:
    """When a folder's list of names changed, in nanoseconds."""
    return os.stat(path).st_mtime_ns


def sync_folder(path: Path) -> None:
    """Make the names of the files in it survive a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def listing(path: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from entries


def _open(path: Path | str) -> tuple[int, os.stat_result]:
    descriptor = os.open(path, os.O_RDONLY | _CAREFUL)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, status


def _some(descriptor: int, size: int, offset: int) -> bytes:
    """So many bytes of an open file, wherever it was read last."""
    os.lseek(descriptor, offset, os.SEEK_SET)
    data = b""
    while len(data) < size and (piece := os.read(descriptor, size - len(data))):
        data += piece
    return data


def _read_into(descriptor: int, target: memoryview) -> int:
    if hasattr(os, "readv"):
        return os.readv(descriptor, [target])
    piece = os.read(descriptor, len(target))
    target[: len(piece)] = piece
    return len(piece)


def _write(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.write(descriptor, view)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        view = view[written:]
