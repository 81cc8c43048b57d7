"""Which of a chunk's fused variants fits a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .encode import disorder

Company = tuple[str, ...]
"""The texts of the chunks that a variant was computed behind, in their order; none for the chunk by itself."""


class Fit(Protocol):
    """Chooses variants. Frozen dataclasses."""

    def choose(self, companies: Sequence[Company], before: Sequence[str]) -> Company:
        """One of ``companies`` for a chunk that stands behind the chunks ``before``."""


@dataclass(frozen=True)
class Nearest:
    """The variant whose company has most in common with the chunks in front: the largest `overlap`, of equal ones the
    fused one, then the newest.
    """

    def choose(self, companies: Sequence[Company], before: Sequence[str]) -> Company:
        order = range(len(companies))
        return companies[max(order, key=lambda n: (overlap(companies[n], before), bool(companies[n]), n))]


@dataclass(frozen=True)
class Ordered:
    """`Nearest` by the `overlap` times ``1 - gamma``, gamma the share of pairs that stand in the other order.

    What Cache-Craft chooses harvested variants by (arXiv 2502.15734, section 3.3), all chunks leaning equally on all.
    """

    def choose(self, companies: Sequence[Company], before: Sequence[str]) -> Company:
        scores = [overlap(company, before) * (1.0 - disorder(company, before)) for company in companies]
        return companies[max(range(len(companies)), key=lambda n: (scores[n], bool(companies[n]), n))]


@dataclass(frozen=True)
class LongestPath:
    """FusionRAG's Alternative Path: the variant computed behind the very chunks in front, or behind the last of them,
    as many as there is a variant for. Everything is tried in this order; the chunk by itself is what remains.
    Source: FusionRAG (arXiv 2601.12904), sections 4 and 5.3.3.
    """

    def choose(self, companies: Sequence[Company], before: Sequence[str]) -> Company:
        known = set(companies)
        return next((path for start in range(len(before)) if (path := tuple(before[start:])) in known), ())


def suits(company: Sequence[str], before: Sequence[str]) -> float:
    """How little there is to repair in a chunk that stands behind the chunks ``before``, 0..1.

    0 for a chunk by itself behind others; 1/2 and more, with the `overlap`, for one that was computed in any company:
    a stranger's company spares it most of what a chunk alone gets wrong (docs/log.md has the measurement).
    """
    return (bool(company) + overlap(company, before)) / 2 if company or before else 1.0


def overlap(company: Sequence[str], before: Sequence[str]) -> float:
    """``|K and B| / |K or B|``, K the chunks a variant was computed behind, B those it stands behind: 0..1; 1 if both
    are none.
    """
    seen, there = set(company), set(before)
    return len(seen & there) / len(seen | there) if seen or there else 1.0
