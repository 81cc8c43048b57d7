"""SIGKILL at random moments, while an engine works and while ``cacheclip ingest`` does: nothing stored is lost.

`test_torture_engine.py` runs a shorter version. What was stored is what was said to be; only public functions of an
engine and the command line are called.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import PASSAGES, tiny_backbone
from torture_counts import Counts, passage
from torture_harness import collect, forked
from typer.testing import CliRunner

from cacheclip_rag import Engine
from cacheclip_rag.cli.main import app

METHODS = ("auto", "naive", "query_guided", "cachecraft")


def command(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def apart(work: Callable[[], Any], wait: Callable[[int], None] = lambda _: None) -> tuple[list[str], int]:
    """Do ``work`` in a process of its own; the lines that it writes, and how it ended. ``wait`` is given its id."""

    def run(report: int) -> None:
        torch.set_num_threads(1)  # the others did not come along
        work(lambda line: os.write(report, f"{line}\n".encode()))  # type: ignore[call-arg]

    child, reader = forked(run)
    wait(child)
    output, code = collect(child, reader)
    return output.decode().splitlines(), code


# ---- an engine ----------------------------------------------------------------------------------------------------


def _prompt(engine: Engine, texts: Sequence[str]) -> str:
    return str(engine.backbone.chat([{"role": "user", "content": "\n\n".join([*texts, "What is it about?"])}]))


def _live(folder: Path, seed: int, stored: Sequence[int], tell: Callable[[str], Any]) -> None:
    """Store, ask and forget until killed, and tell: ``+n`` what is stored, ``-n`` what will be forgotten, ``~n`` what
    is.
    """
    rng, mine = random.Random(seed), list(stored)
    new = iter(range(seed * 1000, (seed + 1) * 1000))
    with Engine(tiny_backbone(), store=folder) as engine:
        tell("open")
        while True:
            match rng.randrange(6):
                case 0 | 1:
                    numbers = [next(new) for _ in range(rng.randint(1, 4))]
                    result = engine.ensure([passage(n) for n in numbers], document=f"document {numbers[0]}")
                    if not result.skipped:
                        tell("".join(f"+{n}\n" for n in numbers)[:-1])
                        mine += numbers
                case 2 | 3:
                    texts = [passage(n) for n in rng.sample(mine, min(2, len(mine)))]
                    engine.generate(
                        _prompt(engine, [*texts, PASSAGES[0]]), method=rng.choice(METHODS), max_new_tokens=2
                    )
                    tell("asked")
                case 4:
                    engine.ensure_later([passage(next(new))])
                    if len(mine) > 1:
                        engine.fuse({passage(mine[-1]): [passage(mine[-2])]})
                case 5:
                    for number in rng.sample(mine, max(0, min(4, len(mine) - 12))):
                        mine.remove(number)
                        tell(f"-{number}")
                        engine.forget([passage(number)])
                        tell(f"~{number}")


def _look(folder: Path, stored: Sequence[int], begun: Sequence[int], seed: int, tell: Callable[[str], Any]) -> None:
    """Another process finds everything, forgets what was begun to be, and goes on."""
    with Engine(tiny_backbone(), store=folder) as engine:
        for number in stored:
            if not engine.knows(passage(number)):
                tell(f"lost: {number}")
        for number in stored[-12:]:
            report = engine.generate(_prompt(engine, [passage(number)]), method="naive", max_new_tokens=1).report
            if not report.reused or report.fallbacks:
                tell(f"not reused: {number}, {report.fallbacks}")
        if begun:
            engine.forget([passage(number) for number in begun])
        new = passage(seed, f"after-{seed}")
        if engine.ensure([new]).skipped or not engine.knows(new):
            tell("it does not go on")
        prompt = _prompt(engine, PASSAGES[:2])
        answer = engine.generate(prompt, method="naive", max_new_tokens=4).ids
        tell(f"answer: {answer}")


def kill_engines(folder: Path, rounds: int, seed: int = 0) -> Counts:
    """Kill a process with an engine at a random moment, ``rounds`` times, all on one folder."""
    counts, rng, store = Counts(), random.Random(seed), folder / "killed"
    stored: list[int] = []
    forgotten: list[int] = []
    with Engine(tiny_backbone(), store=store) as engine:
        engine.ensure(PASSAGES)
        answer = f"answer: {engine.generate(_prompt(engine, PASSAGES[:2]), method='naive', max_new_tokens=4).ids}"
    for number in range(rounds):

        def kill(child: int) -> None:
            time.sleep(rng.uniform(0.05, 1.5))
            os.kill(child, signal.SIGKILL)

        lines, code = apart(lambda tell: _live(store, number + 1, stored, tell), kill)  # noqa: B023
        counts.expect(code == -signal.SIGKILL, f"it ended by itself: {lines[-1:]}")
        counts.done["kills"] += 1
        counts.done["while it opened"] += "open" not in lines
        begun: list[int] = []
        for line in lines:
            what, which = line[:1], line[1:]
            if what == "+":
                stored.append(int(which))
                counts.done["chunks stored"] += 1
            elif what == "-":
                stored.remove(int(which))
                begun.append(int(which))
            elif what == "~":
                begun.remove(int(which))
                forgotten.append(int(which))
            elif what == "!":
                counts.failed.append(line)
        checked = command("store", "verify", "--store", store, "--json")
        counts.expect(checked.exit_code == 0, f"damaged: {checked.output}")
        _nothing_of(forgotten, store, counts)
        seen, code = apart(lambda tell: _look(store, stored, begun, number, tell))  # noqa: B023
        counts.failed += [line for line in seen if line != answer]
        counts.expect(answer in seen and not code, f"the next process gives {seen}, {code}")
        forgotten += begun
        counts.done["interrupted forgettings"] += len(begun)
        _nothing_of(begun, store, counts)
    counts.done["chunks in the end"], counts.done["forgotten"] = len(stored), len(forgotten)
    return counts


def _nothing_of(numbers: Sequence[int], folder: Path, counts: Counts) -> None:
    """No file holds anything of these texts, finished or not, but those of the vector index: Chroma keeps a log."""
    for path in (path for path in folder.rglob("*") if numbers and "chroma" not in path.parts):
        found = re.findall(rb"entry-(\d+)", path.read_bytes()) if path.is_file() else ()
        back = set(map(int, found)).intersection(numbers)
        counts.expect(not back, f"forgotten, and in {path.name}: {back}")


# ---- the command line ---------------------------------------------------------------------------------------------


def kill_ingestions(folder: Path, rounds: int, seed: int = 0, documents: int = 8) -> Counts:
    """Kill ``cacheclip ingest`` at a random moment, ``rounds`` times; each folder of documents until it is read.

    What is stored stays, nothing is read twice, and a document that is gone leaves nothing once a run ends.
    """
    from cacheclip_app import embedding  # noqa: F401  imported once, not by every process that is killed

    counts, rng = Counts(), random.Random(seed)
    model = folder / "model"
    backbone = tiny_backbone()
    backbone.model.save_pretrained(model)
    backbone.tokenizer.save_pretrained(model)
    number = 0
    while counts.done["kills"] < rounds and not counts.failed:
        texts, home = folder / f"documents-{number}", folder / f"home-{number}"
        texts.mkdir()
        for n in range(documents):
            (texts / f"{n}.txt").write_text("\n\n".join(passage(number * 1000 + 10 * n + part) for part in range(4)))
        words = ["ingest", texts, "--home", home, "--model", model, "--auxiliary", "none", "--json"]
        _ingest_with_kills(words, home, rng, counts)
        (texts / "0.txt").unlink()
        _ingest_with_kills(words, home, rng, counts)
        gone = [number * 1000 + part for part in range(4)]
        _nothing_of(gone, home, counts)
        for path in (texts, home):
            shutil.rmtree(path)
        number += 1
    counts.done["folders of documents"] = number
    return counts


def _ingest_with_kills(words: Sequence[Any], home: Path, rng: random.Random, counts: Counts) -> None:
    """Ingest until it is done, killed on the way; then once more, when nothing is left to do."""
    before: set[str] = set()
    wanted = rng.randint(1, 6)
    for turn in range(wanted + 1):
        last = turn == wanted

        def kill(child: int) -> None:
            if last:  # noqa: B023
                return
            here, changes = _state(home), rng.randint(1, 8)
            while changes and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if (now := _state(home)) != here:
                    here, changes = now, changes - 1
                time.sleep(0.0005)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child, signal.SIGKILL)

        lines, code = apart(lambda tell: _run(words, tell), kill)
        if code == -signal.SIGKILL:
            counts.done["kills"] += 1
        elif code:
            counts.failed.append(f"it fails: {lines}")
            return
        else:
            break
        if not home.exists():
            continue
        checked = command("store", "verify", "--store", home, "--json")
        counts.expect(checked.exit_code in (0, 2), f"damaged: {checked.output}")
        now = _keys(home)
        counts.done["chunks there at a kill"] += len(now)
        if "0.txt" in {path.name for path in Path(words[1]).iterdir()}:
            counts.expect(before <= now, f"lost: {before - now}")
        before = now
    done = json.loads(lines[-1])
    counts.expect(done["chunks"] == done["kept"] and not done["skipped"], f"not all are kept: {done}")
    if "0.txt" in {path.name for path in Path(words[1]).iterdir()}:
        counts.expect(done["encoded"] == done["chunks"] - len(before), f"read twice, with {len(before)} there: {done}")
    lines, code = apart(lambda tell: _run(words, tell))
    again = json.loads(lines[-1])
    counts.expect(not code and not again["encoded"] and not again["removed"], f"not finished: {again}")
    counts.expect(len(_keys(home)) == again["chunks"], "other chunks than the documents' are stored")
    counts.done["ingestions that ended"] += 2


def _run(words: Sequence[Any], tell: Callable[[str], Any]) -> None:
    result = command(*words)
    if result.exit_code:
        raise RuntimeError(f"exit code {result.exit_code}: {result.output} {result.exception}")
    tell(result.stdout.strip().splitlines()[-1])


def _state(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((str(path), path.stat().st_mtime_ns))
    return found


def _keys(home: Path) -> set[str]:
    listed = command("store", "list", "--store", home, "--json")
    return {stored["key"] for stored in json.loads(listed.stdout)} if not listed.exit_code else set()
