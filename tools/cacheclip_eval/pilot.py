"""The command ``cacheclip tune recipe``: a pilot on a user's own questions finds the setting of a method to take.

A `grid` of systems over the ordinary evaluation: first who chooses tokens (whose attention, in which band of layers),
then how chunks are encoded and how much is recomputed. Choosing and reporting use different questions.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from filelock import FileLock, Timeout

from cacheclip_rag.engine import Engine
from cacheclip_rag.errors import ConfigurationError

from . import access, recipe, rows
from .choice import FAMILY, Choice, Tried, choose, verdict, verdicts
from .data import Item, spread
from .figures import NAIVE, interval
from .fusable import Planners, by_similarity, by_use
from .grid import COLD, QUESTIONS, Plan, Setting
from .metrics import LEAST, Paired
from .rows import Row
from .runner import run
from .sources import Source
from .systems import System, parse

FUSED = {"similar": by_similarity, "use": by_use}

LENGTH = 32
"""Tokens of an answer at most. The KL decides, over the first `references.ANSWER_TOKENS` of them."""

ROWS = "rows.jsonl"

Half = Mapping[str, Sequence[Item]]
"""Questions by data set."""

Say = Callable[[str], object]


def split(found: Sequence[Source], count: int) -> tuple[Half, Half]:
    """The questions to choose on and those to report on: every second of those spread over each file.

    A question that was asked twice counts once, and one with fewer than two passages not at all: nothing of its prompt
    needs repair. Raises `ConfigurationError` for fewer than `QUESTIONS`.
    """
    usable = {source.name: _usable(source) for source in found}
    asked = {name: spread(items, -(-count // len(found))) for name, items in usable.items()}
    if (total := sum(map(len, asked.values()))) < QUESTIONS:
        raise ConfigurationError(
            f"{', '.join(asked)}: {total} different questions with two passages or more are too few to decide; "
            f"a pilot needs {QUESTIONS}, half to choose on and half to report on"
        )
    choosing, reporting, before = dict[str, list[Item]](), dict[str, list[Item]](), 0
    for name, items in asked.items():  # counted through, so that several sets of odd numbers give equal halves
        choosing[name], reporting[name] = items[before % 2 :: 2], items[1 - before % 2 :: 2]
        before += len(items)
    return choosing, reporting


def _usable(source: Source) -> list[Item]:
    different = dict[str, Item]()
    for item in source.all():
        if len({passage.chunk for passage in item.passages}) > 1:
            different.setdefault(item.question.strip(), item)
    return list(different.values())


def execute(plan: Plan, choosing: Half, reporting: Half, say: Say) -> tuple[dict[str, Any], int]:
    """Run what is missing, decide, and write ``recipe.json`` and ``README.md``. Returns the record, as `recipe.lines`
    takes it, and the number of answers that failed in this run. The halves are those of `split`.

    Raises `ConfigurationError` for rows of another model or version, while another process asks into this folder, and
    where too little was answered; what `Engine` raises.
    """
    rows.prepare(plan.out / ROWS)
    try:
        held = FileLock(plan.out / "lock").acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(f"another process runs a pilot in {plan.out}: give another --out") from None
    with held:
        return _execute(plan, choosing, reporting, say)


def _execute(plan: Plan, choosing: Half, reporting: Half, say: Say) -> tuple[dict[str, Any], int]:
    say("opening the model")
    helper = plan.auxiliary if plan.method.select.needs_auxiliary else None
    with Engine(plan.model, auxiliary=helper, store=plan.store) as engine:
        planners, skipped = _contexts(plan, {name: [*choosing[name], *reporting[name]] for name in choosing}, say)
        pilot = _Pilot(engine, plan, choosing, reporting, planners, say)
        record = pilot.run() | {"skipped": skipped, "identity": access.identity(engine.library.namespace)}
    recipe.write(plan.out, record)
    return record, pilot.failed


def _contexts(plan: Plan, asked: Half, say: Say) -> tuple[dict[str, Planners], dict[str, str]]:
    """What chunks can be fused with, by context, and for the other contexts why they cannot."""
    planners, skipped = dict[str, Planners](), dict[str, str]()
    for context, find in FUSED.items():
        say(f"looking for chunks to fuse with: {context}")
        found = _obstacle(plan) or find(plan.sources, asked, plan.neighbours)
        if isinstance(found, str):
            skipped[context] = found
            say(f"{context} is left out: {found}")
        else:
            planners[context] = found
    return planners, skipped


def _obstacle(plan: Plan) -> str:
    """Why no chunk is fused, whatever the questions."""
    if not plan.method.ahead:
        return f"{plan.name} encodes no chunk ahead"
    return f"--method says fused={plan.given['fused']}" if "fused" in plan.given else ""


@dataclass
class _Pilot:
    """A run. ``timed``: whether it has said how long it will take; ``left_out``: settings that failed, and why."""

    engine: Engine
    plan: Plan
    choosing: Half
    reporting: Half
    planners: Mapping[str, Planners]
    say: Say
    failed: int = 0
    timed: bool = False
    left_out: dict[str, str] = field(default_factory=dict)
    expected: int = 0

    def run(self) -> dict[str, Any]:
        plan, chosen, steps = self.plan, dict[str, str](), list[dict[str, Any]]()
        contexts, middle = [COLD, *self.planners], plan.ratios[len(plan.ratios) // 2]
        defaults = [plan.setting({}, context, plan.method.recompute_ratio) for context in contexts]
        expected = len(defaults) + sum(map(len, plan.choosers().values())) + len(contexts) * len(plan.ratios)
        self.expected = expected * _size(self.choosing) + 4 * _size(self.reporting)
        self.say(f"up to {self.expected:,} answers; the first question tells how long that takes")
        self._answer([one.label for one in defaults], self.choosing)  # all kinds, for the first question's time
        for step, ways in plan.choosers().items():
            tried = [plan.setting({**chosen, **way}, COLD, middle) for way in ways]
            choice = self._step(step, tried, steps, priced=False)
            chosen |= next(way for way, one in zip(ways, tried, strict=True) if one.label == choice.taken.setting)
        grid = [plan.setting(chosen, context, ratio) for context in contexts for ratio in plan.ratios]
        by_label = {one.label: one for one in [*grid, *defaults]}
        choice = self._step("context and ratio", list(by_label.values()), steps, priced=True)
        taken = by_label[choice.taken.setting]
        default = plan.setting({}, taken.context, plan.method.recompute_ratio)
        return {
            "method": taken.method,
            "chunks": taken.context,
            "neighbours": None if taken.context == COLD else taken.neighbours,
            "model": plan.model,
            "auxiliary": plan.auxiliary or None,
            "library": access.version(),
            "questions": {
                "choosing": {name: [item.id for item in items] for name, items in self.choosing.items()},
                "reporting": {name: [item.id for item in items] for name, items in self.reporting.items()},
            },
            "steps": steps,
            "report": self._report(taken.label, choice.best.setting, default.label),
            "left_out": self.left_out,
        }

    def _step(self, name: str, settings: Sequence[Setting], steps: list[dict[str, Any]], *, priced: bool) -> Choice:
        """Answer, choose, and add what was found to ``steps``. Not ``priced``: all cost the same, so that the first one
        stays unless another is better.
        """
        self.say(f"{name}: {len(settings)} settings")
        answered = self._answered([one.label for one in settings], self.choosing)
        ratios = {label: _ratio(mine) for label, mine in answered.items()}
        tried = [
            Tried(label, round(ratios[label], 2) if priced else 0.0, _kl(mine)) for label, mine in answered.items()
        ]
        choice = choose(tried)
        found = [
            _described(one, ratios[one.setting])
            | _difference(choice.differences[one.setting], choice.verdict(one.setting))
            for one in tried
        ]
        steps.append(
            {"step": name, "taken": choice.taken.setting, "best": choice.best.setting, "settings": found}
            | {"questions": len(choice.best.kl)}
        )
        return choice

    def _report(self, taken: str, best: str, default: str) -> dict[str, Any]:
        """The setting that was taken against the best one, the default and plain reuse, on the other questions."""
        self.say("reporting on the other half of the questions")
        labels = list(dict.fromkeys([taken, best, default, NAIVE]))
        answered = self._answered(labels, self.reporting)
        if taken not in answered:
            raise ConfigurationError(f"{taken} was chosen, and failed on other questions: {self.left_out[taken]}")
        tried = {label: Tried(label, 0.0, _kl(mine)) for label, mine in answered.items()}
        against = verdicts(tried[taken], [one for label, one in tried.items() if label != taken])
        scored = any(item.answers for items in self.reporting.values() for item in items)
        found = []
        for label, mine in answered.items():
            about = _described(tried[label], _ratio(mine)) | {"score": _mean(mine, "score") if scored else None}
            if label in against:
                about |= _difference(against[label], verdict(against[label]))
            found.append(about)
        return {
            "questions": len(tried[taken].kl),
            "default": default,
            "level": 1 - FAMILY / max(1, len(against)),
            "score_of_full_prefill": self._score_of_full() if scored else None,
            "settings": found,
        }

    def _answered(self, labels: Sequence[str], half: Half) -> dict[str, list[Row]]:
        """The rows by setting, all of the same questions: those that full prefill answered. A setting that failed on
        one of them is left out. Raises `ConfigurationError` if too few questions or no setting is left.
        """
        self._answer(labels, half)
        kept = rows.read(self.plan.out / ROWS)

        def mine(label: str) -> dict[tuple[str, str], Row]:
            return {(name, item.id): kept[name, item.id, label] for name, items in half.items() for item in items}

        full = mine("full")
        whole = [key for key, row in full.items() if _good(row)]
        self.left_out |= {f"question {row['id']}": row["error"] for row in full.values() if "error" in row}
        if len(whole) < LEAST:
            reason = next((row["error"] for row in full.values() if "error" in row), "")
            raise ConfigurationError(
                f"full prefill answered {len(whole)} of {len(full)} questions, and {LEAST} are needed: {reason}"
            )
        found = dict[str, list[Row]]()
        for label in labels:
            by_question = mine(label)
            answered = [by_question[key] for key in whole]
            if wrong := [row for row in answered if not _good(row)]:
                reason = wrong[0].get("error", "the KL is no number")
                self.left_out[label] = f"{len(wrong)} of {len(answered)} questions: {reason}"
            else:
                found[label] = answered
        if not found:
            raise ConfigurationError(f"no setting answered every question; {labels[0]}: {self.left_out[labels[0]]}")
        return found

    def _score_of_full(self) -> float:
        kept = rows.read(self.plan.out / ROWS)
        mine = [kept[name, item.id, "full"] for name, items in self.reporting.items() for item in items]
        return _mean([row for row in mine if _good(row)], "score")

    def _answer(self, labels: Sequence[str], half: Half) -> None:
        systems = parse(labels)
        for name, items in half.items():
            mine = [dataclasses.replace(s, plan=self.planners[s.context][name]) if s.context else s for s in systems]
            todo = list(items)
            while todo and not self.timed:
                self._first(name, todo.pop(0), mine)
            if todo:
                self._run(name, todo, mine)

    def _first(self, name: str, item: Item, systems: Sequence[System]) -> None:
        """Answer a question, and if there was something left to do, say how long the rest takes."""
        before, start = self._done(), time.monotonic()
        self._run(name, [item], systems)
        if made := self._done() - before:
            minutes = (self.expected - self._done()) * (time.monotonic() - start) / made / 60
            self.timed = True
            self.say(f"{made} answers in {time.monotonic() - start:.0f} s: the rest takes {_time(minutes)} at most")

    def _run(self, name: str, items: Sequence[Item], systems: Sequence[System]) -> None:
        self.failed += run(self.engine, items, systems, self.plan.out / ROWS, dataset=name, max_new_tokens=LENGTH)

    def _done(self) -> int:
        kept = rows.read(self.plan.out / ROWS, repair=True)
        return sum("error" not in row and system != "full" for (_, _, system), row in kept.items())


def _time(minutes: float) -> str:
    return f"some {minutes / 60:.1f} hours" if minutes >= 90 else f"some {max(1, round(minutes))} minutes"


def _size(half: Half) -> int:
    return sum(map(len, half.values()))


def _good(row: Row) -> bool:
    return "error" not in row and math.isfinite(row["kl"])


def _kl(mine: Sequence[Row]) -> tuple[float, ...]:
    return tuple(row["kl"] for row in mine)


def _ratio(mine: Sequence[Row]) -> float:
    """The mean share of tokens recomputed; all of a prompt's where nothing stored could be used."""
    return mean(1.0 if row.get("ratio") is None else row["ratio"] for row in mine)


def _mean(mine: Sequence[Row], name: str) -> float:
    return mean(row[name] for row in mine)


def _described(one: Tried, ratio: float) -> dict[str, Any]:
    return {"setting": one.setting, "ratio": ratio, "kl": one.mean, "kl_interval": interval(one.kl)}


def _difference(found: Paired, said: str) -> dict[str, Any]:
    return {"difference": found.difference, "difference_interval": [found.low, found.high], "verdict": said}
