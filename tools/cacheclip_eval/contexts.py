"""Whom a passage is fused with before a run: what resembles it, or what other questions retrieved with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cacheclip_rag.corpus.neighbours import Embed, similar
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.fit import Context, Fit, Nearest

from .data import Item


@dataclass(frozen=True)
class Gathering:
    """What is fused before an item is asked about: chunks with their ``neighbours``, or whole ``sequences``."""

    neighbours: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sequences: Sequence[Sequence[str]] = ()


Meet = Callable[[Item], Gathering]

SOURCES = ("similar", "use", "prompts")

_PROMPTS = 3
"""Earlier prompts an item's passages may have been in, with ``"prompts"``."""


def meeting(source: str, count: int, corpus: Sequence[Item], more: Iterable[str], embed: Embed) -> Meet:
    """How passages get their context, at most ``count`` others each.

    ``"similar"``: the most similar of all passages of the ``corpus`` of items and ``more`` texts, FusionRAG's way.
    ``"use"``: those that the other items retrieved with it most often. ``"prompts"``: the other items that have most
    passages in common with this one, at most three, each fused as the one text that its prompt was. Passages that no
    other item holds are treated as if their own item had been asked about before, the second half of them first.
    Raises ConfigurationError for another source.
    """
    if source == "similar":
        texts = [passage.chunk for item in corpus for passage in item.passages]
        nearest = similar([*texts, *more], embed, count)
        return lambda item: Gathering({text: nearest[text] for text in _texts(item)})
    together = _Together(corpus)
    if source == "use":
        return lambda item: Gathering({text: together.most(item, text)[:count] for text in _texts(item)})
    if source == "prompts":
        return lambda item: Gathering(sequences=together.prompts(item))
    raise ConfigurationError(f'context is one of {", ".join(SOURCES)}, not "{source}"')


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
        return [t for t in _turned(item) if t != text]

    def prompts(self, item: Item) -> list[list[str]]:
        mine = set(_texts(item))
        others = {
            other.id: other for text in _texts(item) for other in self._items.get(text, ()) if other.id != item.id
        }
        common = sorted(others.values(), key=lambda other: -len(mine & set(_texts(other))))[:_PROMPTS]
        met = {text for other in common for text in _texts(other)}
        return [_texts(other) for other in common] + ([] if mine <= met else [_turned(item)])


def _turned(item: Item) -> list[str]:
    mine = _texts(item)
    half = len(mine) // 2
    return [*mine[half:], *mine[:half]]


def _texts(item: Item) -> list[str]:
    return [passage.chunk for passage in item.passages]


@dataclass(frozen=True)
class Only:
    """A `Fit` that knows no other contexts than ``these``: several systems share one store."""

    these: frozenset[Context]
    fit: Fit = field(default_factory=Nearest)

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        return self.fit.choose([c for c in contexts if not c or c in self.these], before)
