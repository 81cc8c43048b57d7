"""Several requests' methods at once: their forwards are computed together, in passes of bounded size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cacheclip_rag.compute import Part
from cacheclip_rag.store import LoadingCost

from . import seams
from .computer import Forward, Mean, run_forward


@dataclass(eq=False)
class _Task:
    """One request's work in a thread of its own: what it asks for, the answer, and how it ended."""

    number: int
    asked: Any = None
    answer: Any = None
    error: BaseException | None = None
    done: bool = False
    resume: threading.Event = field(default_factory=threading.Event)


class Batch:
    """Runs functions that compute by calling a `PagedComputer`, and merges what they ask for.

    Selectors and recompute steps are written for one request and call ``computer.forward`` where they need it. Here
    each runs in a thread of its own until it asks; once all that still run have asked, their forwards are computed
    together, in the order of the requests, which is the same on all ranks. At most one thread runs at a time besides
    the caller, who alone touches vLLM.
    """

    def __init__(self, model: seams.Model, most: int, cost: LoadingCost | None = None) -> None:
        """``most``: rows of a pass; ``cost`` is told how long passes take."""
        self._model, self._most, self._cost = model, most, cost or LoadingCost()
        self.passes = 0
        self._asked = threading.Event()

    def run(self, works: Sequence[Callable[[Callable[[Any], Any]], Any]]) -> list[Any]:
        """Call each of ``works`` with a function that computes what it is given. Returns the results; where one raised,
        the exception is in its place.
        """
        tasks = [_Task(number) for number in range(len(works))]
        stream = seams.current_stream(self._model.device)
        results: list[Any] = [None] * len(works)

        def start(task: _Task) -> None:
            def ask(question: Any) -> Any:
                task.asked = question
                self._asked.set()
                task.resume.wait()
                task.resume.clear()
                if task.error is not None:
                    raise task.error
                return task.answer

            try:
                with seams.same_stream(stream), torch.inference_mode():
                    results[task.number] = works[task.number](ask)
            except BaseException as error:  # this request's alone
                results[task.number] = error if isinstance(error, Exception) else RuntimeError(repr(error))
            task.done = True
            self._asked.set()

        for task in tasks:
            thread = threading.Thread(target=start, args=(task,), name="cacheclip-request", daemon=True)
            self._until_asked(task, thread.start)
        self._agree(tasks, results)
        while waiting := [task for task in tasks if not task.done]:
            self._answer(waiting)
            for task in waiting:
                self._until_asked(task, task.resume.set)
            self._agree(tasks, results)
        return results

    def _agree(self, tasks: Sequence[_Task], results: list[Any]) -> None:
        """What has failed on one rank fails on all of them, or the others would wait for it in a collective."""
        fine = seams.on_all_ranks([not isinstance(results[task.number], Exception) for task in tasks])
        for task, agreed in zip(tasks, fine, strict=True):
            if agreed or isinstance(results[task.number], Exception):
                continue
            error = RuntimeError("it failed on another rank")
            if not task.done:
                task.error = error
                self._until_asked(task, task.resume.set)
            results[task.number] = error

    def _until_asked(self, task: _Task, go: Callable[[], None]) -> None:
        """Let one task run until it asks for something or ends."""
        task.asked = None
        self._asked.clear()
        go()
        self._asked.wait()

    def _answer(self, tasks: Sequence[_Task]) -> None:
        for task in tasks:
            if isinstance(task.asked, Mean):
                task.answer = seams.mean_over_ranks(task.asked.scores)
        forwards = [task for task in tasks if isinstance(task.asked, Forward)]
        for depth in sorted({task.asked.depth or 0 for task in forwards}):
            for group in self._groups([task for task in forwards if (task.asked.depth or 0) == depth]):
                parts = [part for task in group for part in task.asked.parts]
                try:
                    self._pass(parts, depth or None)
                except Exception as error:  # of the pass: all that share it
                    if seams.rank()[1] > 1:  # the other ranks are in the middle of it
                        raise
                    for task in group:
                        task.error = error

    def _groups(self, tasks: Sequence[_Task]) -> list[list[_Task]]:
        """The tasks in order, in groups of at most ``most`` rows (or one task)."""
        groups: list[list[_Task]] = []
        rows = 0
        for task in tasks:
            mine = sum(len(part.rows) for part in task.asked.parts)
            if not groups or rows + mine > self._most:
                groups.append([])
                rows = 0
            groups[-1].append(task)
            rows += mine
        return groups

    def _pass(self, parts: Sequence[Part], depth: int | None) -> None:
        parts = [part for part in parts if len(part.rows)]
        if parts:
            computed = self._cost.computing(self._model.device)
            if run_forward(self._model, parts, depth):
                computed(sum(len(part.rows) for part in parts))
            self.passes += 1
