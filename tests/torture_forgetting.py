"""Forgetting while threads and other processes ask, announce, look up, fuse and ingest: nothing comes back.

`test_torture_engine.py` runs a shorter version. Only public functions of an engine and the command line are called;
what is left is looked for in the bytes of the store's files.
"""

from __future__ import annotations

import multiprocessing
import random
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_backbone
from torture_counts import Counts, passage
from typer.testing import CliRunner

from cacheclip_rag import Engine
from cacheclip_rag.cli.main import app

METHODS = ("auto", "naive", "fusionrag", "cachecraft", "prefix-cache")


def victim(number: int) -> str:
    """A text that will be forgotten."""
    return passage(number, f"victim-{number:06d}")


def victims_in(folder: Path) -> dict[int, list[Path]]:
    """The texts of which something stands in any file, and in which."""
    found = defaultdict[int, list[Path]](list)
    for path in folder.rglob("*"):
        try:
            data = path.read_bytes() if path.is_file() else b""
        except FileNotFoundError:
            continue
        for number in {int(match) for match in re.findall(rb"victim-(\d{6})", data)}:
            found[number].append(path)
    return found


class Users:
    """An engine and threads that use it: what is about to be forgotten, what just was, and new texts."""

    def __init__(self, folder: Path, at: Any, seed: int, count: int) -> None:
        self.engine = Engine(tiny_backbone(), store=folder, max_requests=4, fuse_when_idle=True)
        self.counts = Counts()
        self._at, self._stop = at, threading.Event()
        self._turns = [threading.Lock() for _ in range(count)]
        self._threads = [
            threading.Thread(target=self._work, args=(seed + number, turn), daemon=True)
            for number, turn in enumerate(self._turns)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, seed: int, turn: threading.Lock) -> None:
        rng, engine = random.Random(seed), self.engine
        while not self._stop.wait(rng.uniform(0, 0.01)):
            with turn:
                near = [victim(max(0, self._at.value + rng.randint(-2, 4))) for _ in range(3)]
                what = rng.choice(("asked", "asked", "announced", "looked up", "fused", "ingested"))
                try:
                    match what:
                        case "asked":
                            self.ask(near, rng.choice(METHODS))
                        case "announced":
                            engine.hint(near, "Which parcel?")
                        case "looked up":
                            [engine.knows(text) for text in near]
                        case "fused":
                            engine.fuse({near[0]: near[1:]})
                        case "ingested":
                            new = passage(rng.randrange(200))
                            rng.choice((engine.ensure, engine.ensure_later))([new])
                    self.counts.done[what] += 1
                except Exception as error:
                    self.counts.failed.append(f"{what}: {type(error).__name__}: {error}")

    def ask(self, texts: list[str], method: str = "naive") -> Any:
        content = "\n\n".join([*texts, "Which parcel?"])
        prompt = self.engine.backbone.chat([{"role": "user", "content": content}])
        return self.engine.generate(prompt, method=method, max_new_tokens=2).report

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing is done meanwhile, nor in the background."""
        with ExitStack() as stack:
            for turn in self._turns:
                stack.enter_context(turn)
            self.engine.flush()
            yield

    def check(self, forgotten: int) -> Counts:
        """Of the first ``forgotten`` texts nothing is known, nor reused."""
        with self.quiet():
            for number in range(max(0, forgotten - 100), forgotten):
                report = self.ask([victim(number)])
                self.counts.expect(not report.reused, f"{number} was reused after it was forgotten")
            back = [number for number in range(forgotten) if self.engine.knows(victim(number))]
            self.counts.expect(not back, f"known after they were forgotten: {back}")
        return self.counts

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
            self.counts.expect(not thread.is_alive(), "a thread hangs")
        self.engine.close()


def _process(pipe: Any, folder: Path, at: Any, seed: int, count: int) -> None:
    """`Users` in a process of their own; numbers are forgotten, and what else comes is a question about them."""
    torch.set_num_threads(1)  # the others did not come along
    users = Users(folder, at, seed, count)
    while (asked := pipe.recv()) is not None:
        what, number = asked
        if what == "forget":
            users.engine.forget([victim(number)])
            pipe.send(users.engine.knows(victim(number)))
        elif what == "check":
            pipe.send(users.check(number))
        elif what == "wait":
            with users.quiet():
                pipe.send(None)
                pipe.recv()
    users.close()
    pipe.send(users.counts)


def forgetting(folder: Path, count: int = 1_000, seed: int = 0, processes: int = 2, checks: int = 10) -> Counts:
    """``count`` texts are forgotten one after another, by an engine here, one in another process, their document's
    name, or ``cacheclip store forget``, some of them after their file was damaged or removed.

    ``checks`` times nobody does anything for a moment, and nothing of what was forgotten so far may be known, reused,
    or stand in a file.
    """
    counts, rng, store = Counts(), random.Random(seed), folder / "forgetting"
    context = multiprocessing.get_context("fork")
    at = context.Value("i", -100, lock=False)
    others = []
    for number in range(processes):  # forked before there are threads
        pipe, there = context.Pipe()
        process = context.Process(target=_process, args=(there, store, at, seed * 1000 + number * 100, 2), daemon=True)
        process.start()
        others.append((pipe, process))
    with Engine(tiny_backbone(), store=store) as first:
        for number in range(0, count, 100):
            some = range(number, min(count, number + 100))
            named = [n for n in some if n % 4 == 1]
            first.ensure([victim(n) for n in some if n % 4 != 1])
            for n in named:
                first.ensure([victim(n)], document=f"document-{n}")
    where = victims_in(store)
    counts.expect(len(where) == count, f"only {len(where)} of {count} were stored")
    users = Users(store, at, seed * 1000 + 900, 3)
    ways = ("here", "by document", "by another process", "by the command line")
    for number in range(count):
        at.value = number
        for path in where[number]:
            if (chance := rng.random()) < 0.1 and path.suffix == ".safetensors":
                path.write_bytes(b"damaged")
            elif chance < 0.2:
                path.unlink(missing_ok=True)
        way = ways[number % 4]
        try:
            if way == "here":
                users.engine.forget([victim(number)])
                counts.expect(not users.engine.knows(victim(number)), f"{number} is known once it was forgotten")
            elif way == "by document":
                users.engine.forget_document(f"document-{number}")
                counts.expect(not users.engine.knows(victim(number)), f"{number} is known once it was forgotten")
            elif way == "by another process":
                pipe, _ = others[number // 4 % processes]
                pipe.send(("forget", number))
                counts.expect(not pipe.recv(), f"{number} is known once it was forgotten")
            else:
                words = ["store", "forget", "--store", str(store), "--containing", f"victim-{number:06d}"]
                result = CliRunner().invoke(app, words)
                # 1: nothing was found, as where the only file of it was damaged or removed
                counts.expect(result.exit_code in (0, 1), f"the command line: {result.output}")
            counts.done["forgettings"] += 1
            counts.done[way] += 1
        except Exception as error:
            counts.failed.append(f"forgetting {way}: {type(error).__name__}: {error}")
        if (number + 1) % max(1, count // checks) == 0:
            for pipe, _ in others:
                pipe.send(("wait", 0))
                pipe.recv()
            with users.quiet():
                back = sorted(n for n in victims_in(store) if n <= number)
                counts.expect(not back, f"stands in a file after it was forgotten: {back}")
            for pipe, _ in others:
                pipe.send(None)
            for pipe, _ in others:
                pipe.send(("check", number + 1))
                pipe.recv()
            users.check(number + 1)
    users.close()
    results = [users.counts]
    for pipe, process in others:
        pipe.send(None)
        results.append(pipe.recv())
        process.join(120)
    for each in results:
        counts.done.update(each.done)
        counts.failed += each.failed
    back = sorted(victims_in(store))
    counts.expect(not back, f"stands in a file in the end: {back}")
    counts.done["came back"] = len(back)
    return counts
