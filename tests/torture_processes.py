"""Processes that are killed at any moment, and several that share a folder and its cap."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stores import HUGE, same
from torture_harness import (
    MODEL,
    OTHER,
    Short,
    System,
    Tally,
    check,
    chunk_of,
    chunks,
    collect,
    forked,
    look,
    open_files,
    size_of,
    stray,
    surely,
)

from cacheclip_rag.store import DiskStore, files, format


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


def several_processes(folder: Path, seconds: float, processes: int = 4, seed: int = 0, kill: bool = False) -> Tally:
    """Several processes, two tenants, one folder and a cap that holds a third of it all; ``kill``: not all survive."""
    tally, rng = Tally(), random.Random(seed)
    here = folder / "several"
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
