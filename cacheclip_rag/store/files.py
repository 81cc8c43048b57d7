"""All file access of the store, in one place that a test can replace."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".tmp-"


def read(path: Path) -> bytes:
    """The whole file. Plain reads, no memory map: a file cut short under a map kills the process."""
    with open(path, "rb") as file:
        return file.read()


def read_head(path: Path, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(size)


def publish(path: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """Write ``data`` so that a reader sees no file or the whole file, also after the process is killed.

    ``sync`` makes it survive a power cut as well. Raises OSError; the temporary file is gone then.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_directory(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    os.replace(path, target)


def touch(path: Path) -> None:
    os.utime(path)


def listing(path: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        yield from entries
