"""Interrupts and forks at random moments.

`test_forks.py` and `test_interrupts.py` run shorter versions. Only public functions of an engine are called; what it
answers is compared with what it answers undisturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny import PASSAGES, tiny_backbone

from cacheclip_rag import Engine, Report

PATIENCE = 120.0
"""Seconds after which something hangs."""


class Interrupt(BaseException):
    """As KeyboardInterrupt is."""


class Overdue(Exception):
    """As time limits are that are no ``BaseException``."""


MESSAGE = "raised by a signal handler"
RAISED = (Interrupt, Overdue, TimeoutError, RuntimeError)


@dataclass
class Tally:
    """What was tried and what came of it. ``failed`` describes everything that must not happen."""

    interrupts: int = 0
    inside: int = 0
    """Interrupts whose traceback goes through the library."""
    forks: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.failed

    def __str__(self) -> str:
        text = f"{self.interrupts:,} interrupts ({self.inside:,} inside the library), {self.forks:,} forks; "
        return text + f"failed: {len(self.failed)}" + "".join(f"\n    {failure}" for failure in self.failed[:10])


def ends(work: Callable[[], Any]) -> Any:
    """What ``work`` gives, done on a thread that must come to an end; raises TimeoutError where it does not."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if not result:
        raise TimeoutError("it hangs, or failed")
    return result[0]


# ---- interrupts ---------------------------------------------------------------------------------------------------


def interrupts(count: int, seed: int = 0, neighbours: int = 1) -> Tally:
    """Raise something from a signal handler so many times while the main thread uses an engine, and ``neighbours``
    other threads, too. No interrupt may be lost, and after each one nothing is held and everything is answered.
    """
    tally, rng, stop = Tally(), random.Random(seed), threading.Event()
    armed: list[type[BaseException]] = []
    raised, unraisable = [0], [0]

    def handler(number: int, frame: Any) -> None:
        if armed:
            raised[0] += 1
            raise armed.pop()(MESSAGE)

    def not_raised(event: Any) -> None:  # from the garbage collector, where nothing can be raised
        unraisable[0] += event.exc_type in RAISED

    def observe(report: Report) -> None:
        # Libraries below swallow an Exception now and then; that this one answers it with a full prefill must not be.
        tally.failed.extend(line for line in report.fallbacks if MESSAGE in line)

    def neighbour(engine: Engine, prompt: str, expected: tuple[int, ...]) -> None:
        while not stop.is_set():
            try:
                if engine.generate(prompt, max_new_tokens=3).ids != expected:
                    tally.failed.append("another thread got another answer")
            except Exception as error:
                tally.failed.append(f"another thread failed: {type(error).__name__}: {error}")
            stop.wait(0.01)

    former, hook = signal.signal(signal.SIGALRM, handler), sys.unraisablehook
    sys.unraisablehook = not_raised
    threads: list[threading.Thread] = []
    try:
        with Engine(tiny_backbone(), method="query_guided", max_requests=2) as engine:
            engine.observers.append(observe)
            engine.ensure(PASSAGES[:4])
            prompts = ["\n\n".join([*rng.sample(PASSAGES[:4], 2), f"Question {i}?"]) for i in range(6)]
            expected = [engine.generate(prompt, max_new_tokens=3).ids for prompt in prompts]
            start = time.monotonic()
            engine.generate(prompts[0], max_new_tokens=3)
            usual = time.monotonic() - start
            for i in range(neighbours):
                threads.append(threading.Thread(target=neighbour, args=(engine, prompts[i], expected[i]), daemon=True))
                threads[-1].start()

            def partly(prompt: str) -> None:
                with engine.stream(prompt, max_new_tokens=20) as stream:
                    next(stream, None)

            def later(prompt: str) -> None:
                engine.ensure_later(PASSAGES[4:])
                engine.flush()

            works = (
                *(4 * (lambda prompt: engine.generate(prompt, max_new_tokens=3),)),
                *(2 * (partly,)),
                lambda prompt: engine.prefill(prompt),
                lambda prompt: engine.ensure([f"{PASSAGES[4]} {prompt[-11:]}"]),
                lambda prompt: engine.forget(PASSAGES[4:]),
                later,
            )
            while tally.interrupts < count:
                work, prompt = rng.choice(works), rng.choice(prompts)
                before = raised[0], unraisable[0]
                error = rng.choice(RAISED)
                caught = _interrupted(work, prompt, armed, error, rng.uniform(0.0, 2 * usual), tally)
                tally.interrupts += raised[0] - before[0]
                if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
                    tally.failed.append("PyTorch is left in another mode")
                    return tally
                if issubclass(error, Interrupt) and raised[0] - before[0] > caught + unraisable[0] - before[1]:
                    tally.failed.append("an interrupt was swallowed")
                if caught and rng.random() < 0.1:
                    which = rng.randrange(len(prompts))
                    try:
                        ids = ends(lambda which=which: engine.generate(prompts[which], max_new_tokens=3).ids)
                    except TimeoutError:
                        tally.failed.append(f"after {tally.interrupts} interrupts the engine hangs")
                        return tally
                    if ids != expected[which]:
                        tally.failed.append("another answer after an interrupt")
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
                if thread.is_alive():
                    tally.failed.append("another thread hangs")
            ends(engine.flush)
            stats = engine.stats()
            if stats.in_flight or stats.waiting or not engine.lock.idle:
                tally.failed.append(f"held in the end: {stats.in_flight} places, {stats.waiting} wait")
            ends(engine.close)
    finally:
        stop.set()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
        sys.unraisablehook = hook
    if tally.interrupts < count:
        tally.failed.append("it ended early")
    return tally


def _interrupted(
    work: Callable[[str], Any],
    prompt: str,
    armed: list[type[BaseException]],
    error: type[BaseException],
    delay: float,
    tally: Tally,
) -> int:
    """Do ``work`` while the clock runs; how many of the handler's exceptions came out of it."""
    caught = 0
    try:
        try:
            armed.append(error)
            signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
            work(prompt)
        finally:
            armed.clear()
            signal.setitimer(signal.ITIMER_REAL, 0)
    except RAISED as out:
        if type(out) in RAISED:
            caught = 1
            trace = out.__traceback__
            while trace is not None and "cacheclip_rag" not in trace.tb_frame.f_code.co_filename:
                trace = trace.tb_next
            tally.inside += trace is not None
    return caught


# ---- forks --------------------------------------------------------------------------------------------------------


def child(work: Callable[[], Any], patience: float = PATIENCE) -> str:
    """How ``work`` ends in a forked process: "ok", what it raised, or "hangs"."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(reader)
            work()
            code = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(code)
    os.close(writer)
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if os.waitpid(process, os.WNOHANG)[0]:
            with os.fdopen(reader, "rb") as pipe:
                return pipe.read().decode() or "ok"
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(reader)
    return "hangs"


def forks(folder: Path, rounds: int, seed: int = 0, threads: int = 3) -> Tally:
    """Fork at random moments while other threads use the engine in every way; the child answers as the parent does."""
    tally, rng, stop = Tally(), random.Random(seed), threading.Event()
    with Engine(tiny_backbone(), method="query_guided", store=folder / "forks", max_requests=2) as engine:
        engine.ensure(PASSAGES)
        prompts = ["\n\n".join([*rng.sample(PASSAGES, 2), f"Question {i}?"]) for i in range(4)]
        expected = [engine.generate(prompt, max_new_tokens=3).ids for prompt in prompts]

        def use(seed: int) -> None:
            rng = random.Random(seed)
            works = (
                lambda text: engine.generate(rng.choice(prompts), max_new_tokens=3),
                lambda text: engine.ensure([text]),
                lambda text: engine.ensure_later([text]),
                lambda text: engine.hint(PASSAGES),
                lambda text: engine.forget([text]),
                lambda text: engine.stats(),
            )
            while not stop.is_set():
                try:
                    rng.choice(works)(f"{PASSAGES[0]} {seed} {rng.randrange(20)}")
                except Exception as error:
                    tally.failed.append(f"another thread failed: {type(error).__name__}: {error}")

        def work(which: int, new: str) -> None:
            assert engine.generate(prompts[which], max_new_tokens=3).ids == expected[which], "another answer"
            engine.ensure([f"{PASSAGES[2]} {new}"])
            engine.ensure_later([f"{PASSAGES[3]} {new}"])
            engine.flush()
            assert engine.knows(f"{PASSAGES[2]} {new}") and engine.knows(f"{PASSAGES[3]} {new}"), "not encoded"
            engine.close()

        running = [threading.Thread(target=use, args=(rng.randrange(1 << 30),), daemon=True) for _ in range(threads)]
        for thread in running:
            thread.start()
        for number in range(rounds):
            time.sleep(rng.uniform(0.0, 0.02))
            which = rng.randrange(len(prompts))
            outcome = child(lambda which=which, number=number: work(which, f"child {number}"))
            tally.forks += 1
            if outcome != "ok":
                tally.failed.append(outcome)
        stop.set()
        for thread in running:
            thread.join(PATIENCE)
            if thread.is_alive():
                tally.failed.append("a thread of the parent hangs")
    return tally
