"""System calls that fail, full disks and power cuts."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores import HUGE, same
from torture_harness import MODEL, Short, System, Tally, check, chunks, collect, forked

from cacheclip_rag.chunks import ChunkKV
from cacheclip_rag.store import DiskStore, format


def failing(number: int) -> Callable[[str, Any], Any]:
    def fail(name: str, real: Callable[[], Any]) -> Any:
        if name == "close":  # as on Linux: the descriptor is gone although close says that it failed
            real()
        raise OSError(number, os.strerror(number))

    return fail


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
