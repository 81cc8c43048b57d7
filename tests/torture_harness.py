"""What breaking the chunk store takes: a tally, chunks that follow from numbers, a stand-in for ``os``, processes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stores import HUGE, same

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import DiskStore, files, format

MODEL = Namespace({"model": "m", "tenant": ""})

OTHER = Namespace({"model": "m", "tenant": "b"})


@dataclass
class Tally:
    """What was tried and what came of it. ``failed`` describes everything that must not happen."""

    rounds: int = 0
    kills: int = 0
    faults: int = 0
    inputs: int = 0
    puts: int = 0
    reads: int = 0
    looks: int = 0
    """How often the size of a folder was taken while others wrote."""
    lost: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> Tally:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def good(self) -> bool:
        return not (self.lost or self.wrong or self.failed)

    def __str__(self) -> str:
        names = ("rounds", "kills", "faults", "inputs", "puts", "reads", "looks")
        text = ", ".join(f"{getattr(self, name):,} {name}" for name in names if getattr(self, name))
        return f"{text}; entries lost: {self.lost}, wrong bytes served: {self.wrong}" + "".join(
            f"\n    {failure}" for failure in self.failed[:10]
        )


def chunk_of(number: int, tokens: int = 4) -> ChunkKV:
    """Chunk ``number``; its KV follows from it."""
    generator = torch.Generator().manual_seed(number)
    kv = torch.randn((2, 2, 1, tokens + number % 3, 4), generator=generator)
    count = kv.shape[3]
    return ChunkKV(f"chunk {number}", torch.arange(count), torch.arange(2 * count).view(count, 2), kv[0], kv[1], number)


def chunks(count: int, namespace: Namespace = MODEL, tokens: int = 4) -> dict[str, ChunkKV]:
    made = [chunk_of(number, tokens) for number in range(count)]
    return {namespace.key(chunk.text): chunk for chunk in made}


def check(
    folder: Path,
    known: dict[str, ChunkKV],
    wanted: set[str],
    tally: Tally,
    namespace: Namespace = MODEL,
    cap: int = HUGE,
) -> DiskStore:
    """Open what was left behind: ``wanted`` must be there, everything that is there must be right."""
    store = DiskStore(folder, namespace, cap, sync=False)
    entries = {entry.key: entry.text for entry in store.entries()}
    for key, chunk in known.items():
        got = store.get(key)
        tally.reads += 1
        if got is None:
            tally.lost += key in wanted
        elif not same(got, chunk):
            tally.wrong += 1
        if key in entries and entries[key] != chunk.text:
            tally.failed.append("a wrong text is listed")
    if not set(entries) <= set(known):
        tally.failed.append("an entry nobody stored")
    return store


def stray(folder: Path) -> list[str]:
    """Files that no store has any business with."""
    return [
        path.name
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in ("namespace.json", ".usage", ".lock")
        and not path.name.startswith(files.TEMPORARY)
        and path.suffix != format.SUFFIX
    ]


def look(folder: Path) -> dict[tuple[Any, ...], int]:
    """Sizes of all files that count, unfinished ones too, by what tells each file from any other one."""
    found = dict[tuple[Any, ...], int]()
    for path in folder.rglob("*"):
        try:
            if path.name.startswith(files.TEMPORARY):
                found[(path,)] = path.stat().st_size  # no name comes twice
            elif path.suffix in (format.SUFFIX, ".bad"):
                status = path.stat()
                found[(path, status.st_ino, status.st_ctime_ns)] = status.st_size
        except FileNotFoundError:
            pass
    return found


def size_of(folder: Path) -> int:
    return sum(look(folder).values())


def surely(before: dict[tuple[Any, ...], int], after: dict[tuple[Any, ...], int]) -> int:
    """How many bytes there were at least, at the moment between two looks: what both have seen was there then."""
    return sum(min(size, after[one]) for one, size in before.items() if one in after)


class System:
    """Stands in for ``os`` in `files`: counts the calls that can fail and does something at the one it was told."""

    CALLS = frozenset(
        "open read readv write fsync ftruncate close replace unlink utime stat fstat scandir mkdir".split()  # noqa: SIM905
    )

    def __init__(self, at: int = -1, act: Callable[[str, Any], Any] | None = None) -> None:
        self.at, self.act, self.calls, self.fired = at, act, 0, ""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number == self.at and self.act is not None:
                self.fired = name
                return self.act(name, lambda: real(*arguments, **options))
            return self.after(name, real, arguments, options)

        return call

    def after(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return real(*arguments, **options)

    @contextmanager
    def installed(self) -> Iterator[System]:
        files.os = self  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            files.os = os  # type: ignore[attr-defined]


class Short(System):
    """Writes and reads a few bytes at a time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random, self.short = random.Random(seed), 0

    def after(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        most = self.random.choice((1, 7, 64, 1000))
        self.short += name in ("write", "read", "readv")
        if name == "write":
            return real(arguments[0], arguments[1][:most])
        if name == "read":
            return real(arguments[0], min(arguments[1], most))
        if name == "readv":
            return real(arguments[0], [arguments[1][0][:most]])
        return real(*arguments, **options)


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Run ``work(descriptor)`` in a process of its own: its id, and where what it writes can be read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            work(writer)
            code = 0
        except BaseException as error:
            os.write(writer, f"!{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    os.close(writer)
    return child, reader


def collect(child: int, reader: int) -> tuple[bytes, int]:
    """All that the process wrote, and how it ended (minus the signal's number where it was killed)."""
    with os.fdopen(reader, "rb") as pipe:
        output = pipe.read()
    return output, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
