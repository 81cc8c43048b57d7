"""Whom a passage is fused with before a run: what resembles it, or what other questions retrieved with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import ConfigurationError
from ..fusion import Company, Embed, Fit, Nearest, similar
from .data import Item

Meet = Callable[[Item], Mapping[str, Sequence[str]]]
"""An item's passages, each with those it is fused with, in that order."""

SOURCES = ("use", "similar")


def meeting(source: str, count: int, corpus: Sequence[Item], more: Iterable[str], embed: Embed) -> Meet:
    """How passages get their company, at most ``count`` others each.

    ``"similar"``: the most similar of all passages of the ``corpus`` of items and ``more`` texts, FusionRAG's way.
    ``"use"``: those that the other items retrieved with it most often; for a passage that no other item holds, those of
    its own item, the second half of them first, as if another question had been asked about them before.
    Raises ConfigurationError for another source.
    """
    if source == "similar":
        texts = [passage.chunk for item in corpus for passage in item.passages]
        nearest = similar([*texts, *more], embed, count)
        return lambda item: {text: nearest[text] for text in _texts(item)}
    if source == "use":
        together = _Together(corpus)
        return lambda item: {text: together.most(item, text)[:count] for text in _texts(item)}
    raise ConfigurationError(f'company is one of {", ".join(SOURCES)}, not "{source}"')


class _Together:
    """Which passages were retrieved together, by item."""

    def __init__(self, corpus: Sequence[Item]) -> None:
        self._items: dict[str, list[Item]] = {}
        for item in corpus:
            for text in _texts(item):
                self._items.setdefault(text, []).append(item)

    def most(self, item: Item, text: str) -> list[str]:
        others = [other for other in self._items.get(text, ()) if other.id != item.id]
        if others:
            met = Counter(t for other in others for t in _texts(other) if t != text)
            return [t for t, _ in met.most_common()]
        mine = _texts(item)
        half = len(mine) // 2
        return [t for t in (*mine[half:], *mine[:half]) if t != text]


def _texts(item: Item) -> list[str]:
    return [passage.chunk for passage in item.passages]


@dataclass(frozen=True)
class Only:
    """A `Fit` that knows no other companies than ``these``: several systems share one store."""

    these: frozenset[Company]
    fit: Fit = field(default_factory=Nearest)

    def choose(self, companies: Sequence[Company], before: Sequence[str]) -> Company:
        return self.fit.choose([c for c in companies if not c or c in self.these], before)
