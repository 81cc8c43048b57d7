"""Contexts for fusing passages in an evaluation: similar passages, or those that other questions retrieved together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cacheclip_rag.corpus.neighbours import Embed, similar
from cacheclip_rag.deprecation import renamed_names
from cacheclip_rag.errors import ConfigurationError
from cacheclip_rag.kv.fit import Context, Fit, Nearest

from .data import Item


@dataclass(frozen=True)
class FusionPlan:
    """What to fuse before an item is answered: chunks behind their ``neighbours``, or whole ``sequences``."""

    neighbours: Mapping[str, Sequence[str]] = field(default_factory=dict)
    sequences: Sequence[Sequence[str]] = ()


Planner = Callable[[Item], FusionPlan]
"""Decides what to fuse for an item."""

SOURCES = ("similar", "use", "prompts")

_PROMPTS = 3
"""Prompts of other items that are fused for an item at most, with ``"prompts"``."""


def planner(source: str, count: int, corpus: Sequence[Item], more: Iterable[str], embed: Embed) -> Planner:
    """The planner that gives each passage a context of at most ``count`` others.

    ``"similar"``: the most similar of all passages of the ``corpus`` of items and of ``more`` texts, as in FusionRAG.
    ``"use"``: those that other items retrieved with it most often. ``"prompts"``: the other items with most passages in
    common with this one, at most three, each fused as one text in the order of its prompt. Passages that no other item
    contains are treated as if their own item had been asked before, with the second half of them first.
    Raises `ConfigurationError` for another source.
    """
    if source == "similar":
        texts = [passage.chunk for item in corpus for passage in item.passages]
        nearest = similar([*texts, *more], embed, count)
        return lambda item: FusionPlan({text: nearest[text] for text in _texts(item)})
    retrieved = _Cooccurrence(corpus)
    if source == "use":
        return lambda item: FusionPlan({text: retrieved.most(item, text)[:count] for text in _texts(item)})
    if source == "prompts":
        return lambda item: FusionPlan(sequences=retrieved.prompts(item))
    raise ConfigurationError(f'context is one of {", ".join(SOURCES)}, not "{source}"')


__getattr__ = renamed_names(__name__, {"meeting": (__name__, "planner")})


class _Cooccurrence:
    """Which passages were retrieved together, by item."""

    def __init__(self, corpus: Sequence[Item]) -> None:
        self._items: dict[str, list[Item]] = {}
        for item in corpus:
            for text in _texts(item):
                self._items.setdefault(text, []).append(item)

    def most(self, item: Item, text: str) -> list[str]:
        """The passages that other items retrieved with ``text``, the most frequent first."""
        others = [other for other in self._items.get(text, ()) if other.id != item.id]
        if others:
            counts = Counter(t for other in others for t in _texts(other) if t != text)
            return [t for t, _ in counts.most_common()]
        return [t for t in _rotated(item) if t != text]

    def prompts(self, item: Item) -> list[list[str]]:
        """The passages of the items with most passages in common with ``item``, by item."""
        mine = set(_texts(item))
        others = {
            other.id: other for text in _texts(item) for other in self._items.get(text, ()) if other.id != item.id
        }
        common = sorted(others.values(), key=lambda other: -len(mine & set(_texts(other))))[:_PROMPTS]
        covered = {text for other in common for text in _texts(other)}
        return [_texts(other) for other in common] + ([] if mine <= covered else [_rotated(item)])


def _rotated(item: Item) -> list[str]:
    """An item's passages, the second half first."""
    mine = _texts(item)
    half = len(mine) // 2
    return [*mine[half:], *mine[:half]]


def _texts(item: Item) -> list[str]:
    return [passage.chunk for passage in item.passages]


@dataclass(frozen=True)
class Only:
    """A `Fit` that chooses among ``these`` contexts only, because several systems share one store."""

    these: frozenset[Context]
    fit: Fit = field(default_factory=Nearest)

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        return self.fit.choose([c for c in contexts if not c or c in self.these], before)
