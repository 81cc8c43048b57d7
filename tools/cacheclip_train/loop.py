"""The training loop: resumable, with early stopping on held-out questions and a checkpoint that a kill leaves whole."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from cacheclip_rag.errors import CacheClipError, ConfigurationError
from cacheclip_rag.store import files

Show = Callable[[str, int, int], None]
"""``show(what, done, total)``, as `cacheclip_rag.cli.progress`."""

CHECKPOINT = "checkpoint"
_STATE, _LOG, _SETTINGS = "state.pt", "log.jsonl", "settings.json"


class TrainingError(CacheClipError):
    """A training that cannot go on, such as one whose loss is not a number."""


@dataclass(frozen=True)
class Settings:
    """How to train. ``batch``: examples of an optimizer step; ``steps``: how many at most, None for all of ``epochs``;
    ``every``: steps between two looks at the held-out questions; ``patience``: how many looks in a row without a lower
    loss end the training.
    """

    epochs: int = 3
    batch: int = 8
    lr: float = 2e-4
    warmup: float = 0.03
    every: int = 20
    patience: int = 4
    seed: int = 0
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "every", "patience", "steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.lr > 0.0:
            raise ConfigurationError(f"lr must be more than 0, not {self.lr}")


class Task(Protocol):
    """What is trained."""

    @property
    def examples(self) -> int: ...

    @property
    def trained(self) -> Mapping[str, nn.Parameter]: ...

    def loss(self, example: int) -> tuple[Tensor, int]:
        """The loss of one example (a scalar with a gradient), and the tokens it took."""

    def held_out(self) -> Mapping[str, float]:
        """Losses on the held-out questions by name. The first is what decides when to stop."""

    def save(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the result as it is now, the best so far. ``history``: what the log holds."""


@dataclass(frozen=True)
class Outcome:
    """How a training ended: ``"done"``, ``"early"`` (no lower held-out loss) or ``"paused"`` (time is up).

    ``best`` and ``first``: the held-out losses at the best look, and before the first step.
    """

    ended: Literal["done", "early", "paused"]
    steps: int
    tokens: int
    seconds: float
    first: Mapping[str, float]
    best: Mapping[str, float]

    @property
    def gained(self) -> bool:
        """Whether training lowered the loss that decides."""
        name = next(iter(self.first))
        return self.best[name] < self.first[name]


def train(
    task: Task, settings: Settings, folder: Path, identity: Mapping[str, Any], hours: float | None, show: Show
) -> Outcome:
    """Train ``task``, from the checkpoint in ``folder`` if there is one, else from the beginning.

    The order of examples follows from the seed and the step, so that a training that was interrupted ends where one
    that was not does. ``identity``: what the training is of, besides ``settings``; a checkpoint of another one is
    refused. ``hours``: of this run, None for no limit. Raises `TrainingError` for a loss or gradient that is not a
    finite number, with the last checkpoint kept; `ConfigurationError` for a folder of another training, and while
    another process trains in it.
    """
    kept = folder / CHECKPOINT
    kept.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(kept / "lock").acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(f"another process trains in {folder}") from None
    with held:
        _same_training(kept / _SETTINGS, {**identity, **dataclasses.asdict(settings)}, folder)
        return _Loop(task, settings, kept, show).run(hours)


class _Loop:
    def __init__(self, task: Task, settings: Settings, kept: Path, show: Show) -> None:
        self.task, self.settings, self.kept, self.show = task, settings, kept, show
        self.names = list(task.trained)
        self.optimizer = torch.optim.AdamW([task.trained[n] for n in self.names], settings.lr, weight_decay=0.0)
        total = settings.epochs * math.ceil(task.examples / settings.batch)
        self.total = total if settings.steps is None else min(total, settings.steps)
        self.step = self.tokens = self.waited = 0
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.ended: Literal["done", "early", "paused"] | None = None
        if (kept / _STATE).is_file():
            self._restore()

    def run(self, hours: float | None) -> Outcome:
        start = self._clock = time.monotonic()
        if not self.history:
            self.show("looking at held-out questions", 0, 0)
            self._look()
        while self.ended is None:
            if hours is not None and time.monotonic() - start > hours * 3600:
                self._keep()
                return self._outcome("paused")
            self.show("training", self.step, self.total)
            self._advance()
            if self.step % self.settings.every == 0 or self.step == self.total:
                self._look()
            elif time.monotonic() - self._clock > 300:
                self._keep()
        return self._outcome(self.ended)

    def _advance(self) -> None:
        """One optimizer step."""
        batch = self._batch()
        loss = 0.0
        for example in batch:
            one, tokens = self.task.loss(example)
            (one / len(batch)).backward()
            loss += float(one.detach()) / len(batch)
            self.tokens += tokens
        parameters = [self.task.trained[name] for name in self.names]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise TrainingError(
                f"the {what} of step {self.step + 1} is no finite number: the last good state is kept in {self.kept}; "
                f"train anew in another folder with a lower --lr than {self.settings.lr:g}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * self._schedule()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def _schedule(self) -> float:
        """Linear warmup, then linear decay to 0."""
        warm = max(1, round(self.settings.warmup * self.total))
        return min((self.step + 1) / warm, (self.total - self.step) / max(1, self.total - warm))

    def _batch(self) -> list[int]:
        """The examples of the next step: every epoch in a random order of its own."""
        per_epoch = math.ceil(self.task.examples / self.settings.batch)
        epoch, within = divmod(self.step, per_epoch)
        generator = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
        order = torch.randperm(self.task.examples, generator=generator).tolist()
        return order[within * self.settings.batch : (within + 1) * self.settings.batch]

    def _look(self) -> None:
        """Look at the held-out questions; save the result if it is the best, and a checkpoint."""
        found = dict(self.task.held_out())
        name = next(iter(found))
        if not all(map(math.isfinite, found.values())):
            raise TrainingError(
                f"a held-out loss after step {self.step} is no finite number: the last good state is kept in "
                f"{self.kept}; train anew in another folder with a lower --lr than {self.settings.lr:g}"
            )
        best = min((row["held_out"][name] for row in self.history), default=math.inf)
        self._count_time()
        row = {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1), "held_out": found}
        self.history.append(row)
        self.waited = 0 if found[name] < best else self.waited + 1
        if self.waited >= self.settings.patience:
            self.ended = "early"
        elif self.step >= self.total:
            self.ended = "done"
        if found[name] < best and self.step:
            self.task.save(self.history)
        self._keep()

    def _keep(self) -> None:
        """Write the checkpoint. A kill leaves the former one or this one."""
        self._count_time()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "waited": self.waited,
            "seconds": self.seconds,
            "ended": self.ended,
            "history": json.dumps(self.history),
            "trained": {name: self.task.trained[name].detach() for name in self.names},
            "optimizer": self.optimizer.state_dict(),
        }
        new = self.kept / f"{_STATE}.new"
        torch.save(state, new)
        os.replace(new, self.kept / _STATE)
        (self.kept / _LOG).write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")

    def _restore(self) -> None:
        try:
            state = torch.load(self.kept / _STATE, weights_only=True)
            with torch.no_grad():
                for name in self.names:
                    self.task.trained[name].copy_(state["trained"][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # torch.load lets errors of several libraries out
            raise ConfigurationError(
                f"the checkpoint {self.kept / _STATE} cannot be read ({error}): train anew in another folder"
            ) from error
        self.step, self.tokens, self.waited = state["step"], state["tokens"], state["waited"]
        self.seconds, self.ended = state["seconds"], state["ended"]
        self.history = json.loads(state["history"])

    def _count_time(self) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def _outcome(self, ended: Literal["done", "early", "paused"]) -> Outcome:
        looks = [row["held_out"] for row in self.history]
        name = next(iter(looks[0]))
        best = min(looks, key=lambda found: found[name])
        return Outcome(ended, self.step, self.tokens, self.seconds, looks[0], best)


def _same_training(path: Path, wanted: Mapping[str, Any], folder: Path) -> None:
    text = json.dumps(wanted, sort_keys=True, indent=1)
    if not path.is_file():
        files.publish(path, text.encode())
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{path} cannot be read ({error}): train anew in another folder") from error
    now = json.loads(text)
    if other := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise ConfigurationError(
            f"{folder} holds a training with another {', '.join(other)}: repeat its command to go on with it, or give "
            "another --out"
        )
