"""Breaks the chunk store on purpose and counts what is lost or wrong: ``python tests/torture.py`` (minutes).

`test_torture.py` runs shorter versions of it. Every function here returns a `Tally`; all chunks are made from their
text, so what a store serves can be compared with what must be there whoever wrote it.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cacheclip_rag.chunks import ChunkKV, Namespace
from cacheclip_rag.store import DiskStore, files, format

MODEL = Namespace({"model": "m", "tenant": ""})
OTHER = Namespace({"model": "m", "tenant": "b"})
HUGE = 1 << 40


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


def same(a: ChunkKV, b: ChunkKV) -> bool:
    tensors = zip((a.ids, a.offsets, a.keys, a.values), (b.ids, b.offsets, b.keys, b.values), strict=True)
    return (a.text, a.position) == (b.text, b.position) and all(torch.equal(x, y) for x, y in tensors)


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


# ---- replacing the operating system ------------------------------------------------------------------------------


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


def failing(number: int) -> Callable[[str, Any], Any]:
    def fail(name: str, real: Callable[[], Any]) -> Any:
        if name == "close":  # as on Linux: the descriptor is gone although close says that it failed
            real()
        raise OSError(number, os.strerror(number))

    return fail


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


def life(store: DiskStore, known: dict[str, ChunkKV], tally: Tally) -> tuple[set[str], int]:
    """A store's whole life in one call; the keys that must be there afterwards, but for so many that were evicted."""
    keys = list(known)
    wanted = set()
    for key in keys[:4]:
        tally.puts += 1
        if store.put(key, known[key]):
            wanted.add(key)
    for key in keys[:5]:
        got = store.get(key)
        tally.reads += 1
        tally.wrong += got is not None and not same(got, known[key])
    store.refresh()
    wanted.discard(keys[0])
    store.delete([keys[0]])
    list(store.entries())
    return wanted, store.stats().evicted


def faults(folder: Path, numbers: tuple[int, ...] = (errno.ENOSPC, errno.EIO), stride: int = 1) -> Tally:
    """Fail the Nth system call of a store's life, for every N, with each of these errors; then every write short."""
    tally, known = Tally(), chunks(6)

    def one(system: System) -> None:
        here = folder / f"faults-{tally.rounds}"
        tally.rounds += 1
        wanted, evicted, lost = set[str](), 0, tally.lost
        try:
            with system.installed():
                wanted, evicted = life(DiskStore(here, MODEL, HUGE, sync=True), known, tally)
        except Exception as error:
            # Opening may say that the folder cannot be used; nothing else may raise.
            if type(error).__name__ != "StoreError":
                tally.failed.append(f"{type(error).__name__} at {system.fired} ({error})")
        check(here, known, wanted, tally)
        tally.lost = max(lost, tally.lost - evicted)
        if evicted > 2:  # they differ in size
            tally.failed.append(f"{evicted} evictions for one full disk")
        shutil.rmtree(here, ignore_errors=True)

    for number in numbers:
        at = 0
        while True:
            system = System(at, failing(number))
            one(system)
            if not system.fired:
                break
            tally.faults += 1
            at += stride
    for seed in range(8):
        short = Short(seed)
        one(short)
        tally.faults += short.short
    return tally


def full(folder: Path, mount: bool = False) -> Tally:
    """Real limits: no file may grow beyond some bytes; with ``mount``, a file system of 256 KiB (where root may)."""
    tally, known = Tally(), chunks(40, tokens=200)
    size = len(format.dump(*next(iter(known.items())), MODEL))

    def work(report: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
        store = DiskStore(folder / "limited", MODEL, HUGE, sync=False)
        kept = [store.put(key, chunk) for key, chunk in known.items()]
        os.write(report, b"%d\n" % sum(kept))

    output, code = collect(*forked(work))
    tally.faults += len(known)
    tally.rounds += 1
    if code != 0 or output != b"0\n":
        tally.failed.append(f"limited files: {code}, {output!r}")
    check(folder / "limited", known, set(), tally)
    if mount:
        disk = folder / "small"
        disk.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
        if made.returncode == 0:
            try:
                store = DiskStore(disk, MODEL, HUGE, sync=False)
                kept = [key for key, chunk in known.items() if store.put(key, chunk)]
                tally.puts, tally.rounds = tally.puts + len(known), tally.rounds + 1
                tally.faults += store.stats().evicted
                if kept[-1] != list(known)[-1] or not store.stats().evicted:
                    tally.failed.append("a small disk: nothing was evicted for what is new")
                check(disk, known, {kept[-1]}, tally)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
    return tally


# ---- killing -----------------------------------------------------------------------------------------------------


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


def journal(output: bytes, keys: list[str], tally: Tally) -> set[str]:
    """What must be there after these acknowledgements: ``+n`` for a finished put, ``-n`` before a deletion."""
    wanted: set[str] = set()
    for line in output.decode().splitlines():
        if line.startswith("!"):
            tally.failed.append(line)
        elif line.startswith("+"):
            tally.puts += 1
            wanted.add(keys[int(line[1:])])
        elif line.startswith("-"):
            wanted.discard(keys[int(line[1:])])
    return wanted


def kill_points(folder: Path, stride: int = 1) -> Tally:
    """Kill the process at the Nth system call of a store's life, for every N."""
    tally, known = Tally(), chunks(6)
    keys = list(known)

    def die(name: str, real: Callable[[], Any]) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    at = 0
    while True:
        here = folder / f"points-{at}"

        def work(report: int, here: Path = here, at: int = at) -> None:
            with System(at, die).installed():
                store = DiskStore(here, MODEL, HUGE, sync=True)
                for number, key in enumerate(keys[:3]):
                    if store.put(key, known[key]):
                        os.write(report, b"+%d\n" % number)
                os.write(report, b"-0\n")
                store.delete([keys[0]])
                store.get(keys[1])

        output, code = collect(*forked(work))
        tally.rounds += 1
        wanted = journal(output, keys, tally)
        store = check(here, known, wanted, tally)
        for key in known:  # and it can go on
            tally.lost += not (store.put(key, known[key]) and store.get(key) is not None)
        if names := stray(here):
            tally.failed.append(f"left behind at {at}: {names}")
        shutil.rmtree(here, ignore_errors=True)
        if code == 0:
            return tally
        tally.kills += code == -signal.SIGKILL
        at += stride


def kills(folder: Path, rounds: int, seed: int = 0, writers: int = 2) -> Tally:
    """Kill writers at random moments, round after round over one folder, and look for what they had acknowledged.

    Each process puts and deletes its own chunks and reads everybody's, so its journal says what must be there.
    """
    tally, known, rng = Tally(), chunks(60), random.Random(seed)
    keys = list(known)
    here = folder / "kills"
    must: set[str] = set()

    def writer(number: int, seed: int, sync: bool, small: bool) -> Callable[[int], None]:
        def work(report: int) -> None:
            own, rng = [n for n in range(len(keys)) if n % writers == number], random.Random(seed)
            store = DiskStore(here, MODEL, HUGE, sync=sync)
            system = Short(seed) if small else System()
            with system.installed():
                while True:
                    n, action = rng.choice(own), rng.random()
                    if action < 0.5:
                        if store.put(keys[n], known[keys[n]]):
                            os.write(report, b"+%d\n" % n)
                    elif action < 0.65:
                        os.write(report, b"-%d\n" % n)
                        store.delete([keys[n]])
                    elif action < 0.95:
                        key = rng.choice(keys)
                        got = store.get(key)
                        if got is not None and not same(got, known[key]):
                            os.write(report, b"!wrong bytes\n")
                    else:
                        store.refresh()

        return work

    for _ in range(rounds):
        running = [
            forked(writer(number, rng.random().__hash__(), rng.random() < 0.5, rng.random() < 0.3))
            for number in range(writers)
        ]
        time.sleep(rng.uniform(0.005, 0.08))
        for child, _reader in rng.sample(running, len(running)):
            os.kill(child, signal.SIGKILL)
        for number, (child, reader) in enumerate(running):
            output, code = collect(child, reader)
            tally.kills += code == -signal.SIGKILL
            own = {key for n, key in enumerate(keys) if n % writers == number}
            touched = {keys[int(line[1:])] for line in output.decode().splitlines() if line[:1] in "+-"}
            must = (must - touched) | (journal(output, keys, tally) & own)
        tally.rounds += 1
        check(here, known, must, tally)
        if names := stray(here):
            tally.failed.append(f"left behind: {names}")
        if rng.random() < 0.1:  # what crashes leave is swept, and so is nothing else
            for path in here.rglob(f"{files.TEMPORARY}*"):
                os.utime(path, (0, 0))
            check(here, known, must, tally)
            if list(here.rglob(f"{files.TEMPORARY}*")):
                tally.failed.append("temporary files were not swept")
    return tally


# ---- power cuts --------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    pass


class Disk(System):
    """Knows what was synced, and on a power cut takes back or scrambles, at random, what was not."""

    def __init__(self, at: int, seed: int) -> None:
        super().__init__(at, self._cut)
        self.random = random.Random(seed)
        self.names: dict[int, Path] = {}
        self.dirty: set[Path] = set()
        self.renamed: dict[Path, list[tuple[Path, bytes | None]]] = {}
        self.removed: dict[Path, dict[Path, bytes]] = {}

    def after(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        before = None
        if name in ("replace", "unlink") and Path(arguments[-1]).exists():
            before = Path(arguments[-1]).read_bytes()
        result = real(*arguments, **options)
        if name == "open":
            self.names[result] = Path(arguments[0])
        elif name in ("write", "ftruncate"):
            self.dirty.add(self.names[arguments[0]])
        elif name == "fsync":
            path = self.names[arguments[0]]
            self.dirty.discard(path)
            self.renamed.pop(path, None)
            self.removed.pop(path, None)
        elif name == "unlink" and before is not None:
            self.removed.setdefault(Path(arguments[0]).parent, {})[Path(arguments[0])] = before
        elif name == "replace":
            source, target = Path(arguments[0]), Path(arguments[1])
            if source in self.dirty:
                self.dirty = (self.dirty - {source}) | {target}
            self.renamed.setdefault(target.parent, []).append((target, before))
        return result

    def _cut(self, name: str, real: Callable[[], Any]) -> Any:
        raise PowerCut

    def scramble(self) -> int:
        """What the disk may hold after the cut; how many files it changed."""
        changed = 0
        for path in self.dirty:
            if path.exists() and self.random.random() < 0.8:
                data = bytearray(path.read_bytes())
                kind = self.random.randrange(4)
                if kind == 0:
                    data = bytearray(len(data))
                elif kind == 1:
                    del data[self.random.randrange(len(data) + 1) :]
                elif kind == 2:
                    data[self.random.randrange(len(data) + 1) :] = self.random.randbytes(8)
                else:
                    at = self.random.randrange(len(data) + 1)
                    data[at:] = bytes(len(data) - at)
                path.write_bytes(bytes(data))
                changed += 1
        for names in self.renamed.values():
            for target, before in reversed(names):
                if target.exists() and self.random.random() < 0.5:
                    changed += 1
                    if before is None:
                        target.unlink()
                    else:
                        target.write_bytes(before)
        for names_left in self.removed.values():
            for path, data in names_left.items():
                if not path.exists() and self.random.random() < 0.5:
                    changed += 1
                    path.write_bytes(data)
        return changed


def power_cuts(folder: Path, rounds: int, seed: int = 0) -> Tally:
    """Cut the power at a random system call. Synced puts survive, and what was deleted so does not come back; what was
    not synced is there, or a miss, and never wrong.
    """
    tally, known, rng = Tally(), chunks(8), random.Random(seed)
    for number in range(rounds):
        here, sync, done, gone = folder / f"power-{number}", rng.random() < 0.5, set[str](), set[str]()
        here.mkdir()
        disk = Disk(rng.randrange(5, 120), rng.randrange(1 << 30))
        try:
            with disk.installed():
                store = DiskStore(here, MODEL, HUGE, sync=sync)
                for key, chunk in known.items():
                    if store.put(key, chunk):
                        done.add(key)
                        tally.puts += 1
                    if rng.random() < 0.3:
                        done.discard(key)
                        store.delete([key])
                        gone.add(key)
        except PowerCut:
            pass
        tally.faults += disk.scramble()
        tally.rounds += 1
        store = check(here, known, done if sync else set(), tally)
        if sync and any(key in store for key in gone):
            tally.failed.append("what was deleted came back")
        shutil.rmtree(here)
    return tally


# ---- damage ------------------------------------------------------------------------------------------------------


def mutate(good: bytes, donor: bytes, rng: random.Random) -> bytes:
    """A file's bytes after an accident, or after somebody's work."""
    data = bytearray(good)
    header = 8 + int.from_bytes(good[:8], "little")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(header) if rng.random() < 0.5 else rng.randrange(len(data) + 1)
        kind = rng.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 20))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 50)]
        elif kind == 4:
            data[at:] = donor[at:]
        elif kind == 5:
            data[:8] = rng.choice((0, 1, header - 7, len(good), 1 << 20, 1 << 33, 1 << 62, (1 << 64) - 1)).to_bytes(
                8, "little"
            )
        elif kind == 6:
            data = bytearray(rng.randbytes(rng.randrange(400)))
        elif kind == 7:
            data += rng.randbytes(rng.randrange(1, 100))
        else:
            data[at : at + 64] = bytes(len(data[at : at + 64]))
    return bytes(data)


def lie(good: bytes, rng: random.Random) -> bytes:
    """A file whose header is well-formed JSON and says something else."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    values: list[Any] = ["", "x", 0, -1, 1 << 70, None, [], {}, "F64", "BF16", [0, 0], [1 << 62], True, "chunk 1"]
    name = rng.choice(list(header))
    target = header[name]
    if rng.random() < 0.2:
        header[rng.choice(["more", "extra.more", "keys", "__metadata__"])] = rng.choice([target, *values])
    elif rng.random() < 0.2:
        del header[name]
    else:
        part = rng.choice(list(target))
        if rng.random() < 0.3:
            del target[part]
        else:
            target[part] = rng.choice(values)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + good[8 + length :]


def damage(folder: Path, inputs: int, seed: int = 0) -> Tally:
    """Damaged, forged and random files, through the whole store: none is served unless it is what was stored."""
    tally, rng = Tally(), random.Random(seed)
    known = chunks(2)
    (key, chunk), (other, donor) = known.items()
    good, second = format.dump(key, chunk, MODEL), format.dump(other, donor, MODEL)
    store = DiskStore(folder / "damage", MODEL, HUGE, sync=False)
    path = store.path / f"{key}{format.SUFFIX}"
    for _ in range(inputs):
        data = lie(good, rng) if rng.random() < 0.4 else mutate(good, second, rng)
        if rng.random() < 0.5:  # known to the index, damaged later
            path.write_bytes(good)
            store._adopt(key)
        path.write_bytes(data)
        tally.inputs += 1
        try:
            store._adopt(key)
            got = store.get(key)
        except Exception as error:
            tally.failed.append(f"{type(error).__name__}: {error}")
            continue
        tally.reads += 1
        if got is not None and not same(got, chunk):
            tally.wrong += 1
        path.unlink(missing_ok=True)
    return tally


# ---- company -----------------------------------------------------------------------------------------------------


def company(folder: Path, seconds: float, processes: int = 4, seed: int = 0, kill: bool = False) -> Tally:
    """Several processes, two tenants, one folder and a cap that holds a third of it all; ``kill``: not all survive."""
    tally, rng = Tally(), random.Random(seed)
    here = folder / "company"
    known = {namespace.digest: chunks(40, namespace, tokens=40) for namespace in (MODEL, OTHER)}
    size = max(len(format.dump(key, chunk, MODEL)) for key, chunk in known[MODEL.digest].items())
    cap = 27 * size
    until = time.monotonic() + seconds

    def work(seed: int) -> Callable[[int], None]:
        def run(report: int) -> None:
            rng = random.Random(seed)
            stores = [DiskStore(here, namespace, cap, sync=False) for namespace in (MODEL, OTHER)]
            reads = puts = 0
            while time.monotonic() < until:
                store = rng.choice(stores)
                key, chunk = rng.choice(list(known[store.namespace.digest].items()))
                action = rng.random()
                if action < 0.5:
                    got = store.get(key)
                    reads += 1
                    if got is not None and not same(got, chunk):
                        os.write(report, b"!wrong bytes\n")
                elif action < 0.9:
                    puts += store.put(key, chunk)
                elif action < 0.95:
                    store.delete([key])
                elif action < 0.98:
                    list(store.entries())
                else:
                    stores = [DiskStore(here, namespace, cap, sync=False) for namespace in (MODEL, OTHER)]
            if open_files() > before + 2:
                os.write(report, b"!descriptors leak\n")
            os.write(report, f"={puts} {reads}\n".encode())

        before = open_files()
        return run

    running = [forked(work(rng.randrange(1 << 30))) for _ in range(processes)]
    victims = running[: processes // 2] if kill else []
    most, earlier = 0, look(here)
    while time.monotonic() < until:
        now = look(here)
        most, earlier, tally.looks = max(most, surely(earlier, now)), now, tally.looks + 1
        time.sleep(0.002)
        if victims and time.monotonic() > until - seconds / 2:
            os.kill(victims.pop()[0], signal.SIGKILL)
    if most > cap:
        tally.failed.append(f"{most:,} bytes under a cap of {cap:,}")
    for child, reader in running:
        output, code = collect(child, reader)
        tally.kills += code == -signal.SIGKILL
        if code not in (0, -signal.SIGKILL if kill else 0):
            tally.failed.append(f"a process ended with {code}")
        for line in output.decode().splitlines():
            if line.startswith("="):
                puts, reads = map(int, line[1:].split())
                tally.puts, tally.reads = tally.puts + puts, tally.reads + reads
            elif line == "!wrong bytes":
                tally.wrong += 1
            else:
                tally.failed.append(line)
    tally.rounds += 1
    for namespace in (MODEL, OTHER):
        check(here, known[namespace.digest], set(), tally, namespace, cap=cap)
    if names := stray(here):
        tally.failed.append(f"left behind: {names}")
    final = DiskStore(here, MODEL, cap, sync=False)
    new = chunk_of(1000, tokens=40)
    if not final.put(MODEL.key(new.text), new) or size_of(here) > cap:
        tally.failed.append(f"{size_of(here):,} bytes in the end, under a cap of {cap:,}")
    return tally


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Break the chunk store on purpose; count what is lost or wrong.")
    parser.add_argument("--rounds", type=int, default=200, help="kills at random moments, and power cuts")
    parser.add_argument("--inputs", type=int, default=20_000, help="damaged files")
    parser.add_argument("--seconds", type=float, default=30.0, help="of several processes on one folder")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--folder", type=Path, help="where to work (a temporary folder otherwise)")
    options = parser.parse_args()
    everything = Tally()
    logging.disable()  # every fault is reported as it should be, thousands of times
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="torture-") as name:
        folder = Path(name)
        errors = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EINTR, errno.EMFILE)
        for title, run in {
            "an error at each system call": lambda: faults(folder, errors),
            "full disks": lambda: full(folder, mount=True),
            "killed at each system call": lambda: kill_points(folder),
            "killed at random moments": lambda: kills(folder, options.rounds, options.seed),
            "power cut": lambda: power_cuts(folder, options.rounds * 5, options.seed),
            "damaged and forged files": lambda: damage(folder, options.inputs, options.seed),
            "company": lambda: company(folder, options.seconds, options.processes, options.seed),
            "company, half of it killed": lambda: company(
                folder / "k", options.seconds / 3, options.processes, options.seed, kill=True
            ),
        }.items():
            start = time.monotonic()
            tally = run()
            everything.add(tally)
            print(f"{title} ({time.monotonic() - start:.0f} s): {tally}", flush=True)
    print(f"all: {everything}")
    return 0 if everything.good else 1


if __name__ == "__main__":
    sys.exit(main())
