"""Fitting a distribution over a prompt's tokens to the primary's: the task, and how far both are apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from cacheclip_eval.data import Item
from torch import Tensor, nn

from cacheclip_rag.errors import PromptError

from .teacher import Teacher, kl

UNIT = "KL from the primary's attention over tokens (nats), and the share of its top fifth that is missed"


class Selector(Protocol):
    """What gives every token of a prompt's chunks a probability."""

    @property
    def trained(self) -> Mapping[str, nn.Parameter]: ...

    def training(self) -> None:
        """Called before a loss is computed."""

    def looking(self, untuned: bool = False) -> AbstractContextManager[None]:
        """Without gradients; ``untuned``: `compared` is of the model as it was before training."""

    def compared(self, item: Item) -> tuple[Tensor, Tensor, int]:
        """The primary's and the selector's distribution over tokens, ``[C]`` each, and how many rows it took."""


class Targets:
    """The teacher's attention to items' characters, each computed once."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher, self._known = teacher, dict[str, dict[str, np.ndarray]]()

    def has(self, item: Item) -> bool:
        """Whether there is a target for an item."""
        try:
            return self._teacher.sees(item)
        except PromptError:
            return False

    def of(self, item: Item) -> dict[str, np.ndarray]:
        if item.id not in self._known:
            self._known[item.id] = self._teacher.masses(item)
        return self._known[item.id]


class Fitting:
    """The `loop.Task` of fitting a ``selector``: the loss is ``KL(p || q)``, p the primary's distribution."""

    def __init__(
        self, selector: Selector, train: Sequence[Item], stop: Sequence[Item], save: Callable[[Any], None]
    ) -> None:
        self._selector, self._train, self._stop, self.save = selector, train, stop, save

    @property
    def examples(self) -> int:
        return len(self._train)

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        return self._selector.trained

    def loss(self, example: int) -> tuple[Tensor, int]:
        self._selector.training()
        p, q, tokens = self._selector.compared(self._train[example])
        return kl(p, q), tokens

    def held_out(self) -> Mapping[str, float]:
        return mean(self._selector, self._stop)


def mean(selector: Selector, items: Sequence[Item], untuned: bool = False) -> dict[str, float]:
    """The mean divergence, and the mean share of the primary's top fifth of tokens that is not in the selector's."""
    sums = Counter[str]()
    with selector.looking(untuned):
        for item in items:
            p, q, _ = selector.compared(item)
            count = max(1, len(p) // 5)
            both = set(p.topk(count).indices.tolist()) & set(q.topk(count).indices.tolist())
            sums.update({"KL": float(kl(p, q)), "top fifth missed": 1 - len(both) / count})
    return {name: value / len(items) for name, value in sums.items()}


def report(selector: Selector, items: Sequence[Item]) -> dict[str, float]:
    """`mean`, tuned and untuned."""
    found = {}
    for untuned in (True, False):
        for name, value in mean(selector, items, untuned).items():
            found[f"{'untuned' if untuned else 'tuned'}, {name}"] = value
    return found
