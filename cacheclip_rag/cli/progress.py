"""Progress on stderr: a bar at a terminal, a plain line now and then in a log file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

Show = Callable[[str, int, int], None]
"""``show(what, done, total)``; total 0: not known."""

EVERY = 15.0
"""Seconds between two lines about the same stage."""


@contextmanager
def bar(ending: str = "done") -> Iterator[Show]:
    """Shows progress while its body runs: lines, where stderr is no terminal, the last of them as `timed` says it."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("starting", total=None)
            yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total or None)
    else:
        with timed(ending):
            yield lines(say)


@contextmanager
def timed(ending: str) -> Iterator[None]:
    """Says ``ending`` and the time its body took, unless it raises, or stderr is a terminal."""
    start = time.monotonic()
    yield
    if not Console(stderr=True).is_terminal:
        say(f"{ending} in {time.monotonic() - start:.1f} s")


def lines(write: Callable[[str], object], clock: Callable[[], float] = time.monotonic) -> Show:
    """Progress as lines: one for each stage when it begins, and then one in `EVERY` seconds."""
    begun, last = set[str](), clock()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if what in begun and clock() - last < EVERY:
            return
        begun.add(what)
        last = clock()
        write(f"{what}, {done:,} of {total:,}" if total else what)

    return show


def say(message: str) -> None:
    """A line on stderr."""
    typer.echo(f"cacheclip: {message}", err=True)
