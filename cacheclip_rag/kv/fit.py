"""Which of a chunk's fused variants fits a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .encode import disorder

Context = tuple[str, ...]
"""The texts of the chunks that a variant was computed behind, in their order; none for the chunk by itself."""


class Fit(Protocol):
    """Chooses variants. Frozen dataclasses."""

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        """One of ``contexts`` for a chunk that stands behind the chunks ``before``."""


@dataclass(frozen=True)
class Nearest:
    """The variant whose context has most in common with the chunks in front: the largest `context_overlap`; of equal
    ones the fused one, then the newest.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        order = range(len(contexts))
        return contexts[max(order, key=lambda n: (context_overlap(contexts[n], before), bool(contexts[n]), n))]


@dataclass(frozen=True)
class Ordered:
    """`Nearest` by the `context_overlap` times ``1 - gamma``, gamma the share of pairs that stand in the other order.

    What Cache-Craft chooses harvested variants by (arXiv 2502.15734, section 3.3), all chunks leaning equally on all.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        scores = [context_overlap(context, before) * (1.0 - disorder(context, before)) for context in contexts]
        return contexts[max(range(len(contexts)), key=lambda n: (scores[n], bool(contexts[n]), n))]


@dataclass(frozen=True)
class LongestPath:
    """FusionRAG's Alternative Path: the variant computed behind the very chunks in front, or behind the last of them,
    as many as there is a variant for. Everything is tried in this order; the chunk by itself is what remains.
    Source: FusionRAG (arXiv 2601.12904), sections 4 and 5.3.3.
    """

    def choose(self, contexts: Sequence[Context], before: Sequence[str]) -> Context:
        known = set(contexts)
        return next((path for start in range(len(before)) if (path := tuple(before[start:])) in known), ())


def context_fit(context: Sequence[str], before: Sequence[str]) -> float:
    """How little there is to repair in a chunk that stands behind the chunks ``before``, 0..1.

    0 for a chunk encoded by itself that stands behind others; 1/2 and more, growing with the `context_overlap`, for one
    computed behind any other chunks, which spares it most of what a chunk by itself gets wrong (docs/log.md).
    """
    return (bool(context) + context_overlap(context, before)) / 2 if context or before else 1.0


def context_overlap(context: Sequence[str], before: Sequence[str]) -> float:
    """``|K and B| / |K or B|``, K the chunks a variant was computed behind, B those it stands behind: 0..1; 1 if both
    are none.
    """
    seen, there = set(context), set(before)
    return len(seen & there) / len(seen | there) if seen or there else 1.0
