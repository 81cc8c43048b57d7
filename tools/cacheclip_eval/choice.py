"""The decision of a pilot: which of several settings to take, by their KL on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from .metrics import Paired, paired

STANDARD_ERROR = 0.6827
"""The level of an interval of one standard error to each side."""

FAMILY = 0.05
"""The chance of a wrong verdict that `verdicts` allows, over all of its comparisons together."""


@dataclass(frozen=True)
class Tried:
    """A setting, what it costs (the mean share of tokens recomputed), and its KL by question.

    The questions are the same, in the same order, for all settings that are compared.
    """

    setting: str
    cost: float
    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.kl)


@dataclass(frozen=True)
class Choice:
    """The setting ``taken``, the one with the ``best`` (lowest mean) KL, and by setting the KL minus the best one's."""

    taken: Tried
    best: Tried
    differences: dict[str, Paired]

    def verdict(self, setting: str) -> str:
        """ "best", "worse", or "undecided" where the 95 % interval of the difference contains 0."""
        return "best" if setting == self.best.setting else verdict(self.differences[setting])

    @property
    def undecided(self) -> list[str]:
        """The settings that cannot be told from the best one."""
        return [setting for setting in self.differences if self.verdict(setting) == "undecided"]


def choose(tried: Sequence[Tried]) -> Choice:
    """Take the cheapest setting whose mean KL is at most one standard error above the best one's.

    The standard error is that of the paired difference (bootstrapped); of equally cheap settings the first is taken.
    It is the one-standard-error rule of Breiman et al. (1984). A 95 % interval instead would take more settings that
    are worse: few questions have wide intervals, and then the cheapest one would always do. For the same reason nothing
    is corrected for many comparisons here: the best setting is partly lucky, so its KL on these questions is no claim.
    Measure that on others. Raises ValueError without settings, and for KL lists of different length.
    """
    if not tried:
        raise ValueError("there is no setting to choose from")
    best = min(tried, key=lambda one: (one.mean, one.cost))
    close = [one for one in tried if one is best or paired(one.kl, best.kl, level=STANDARD_ERROR).low <= 0]
    return Choice(min(close, key=lambda one: one.cost), best, {one.setting: paired(one.kl, best.kl) for one in tried})


def verdict(difference: Paired) -> str:
    """What a difference in KL says of the first of its two settings: "better", "worse" or "undecided"."""
    if not difference.found:
        return "undecided"
    return "worse" if difference.difference > 0 else "better"


def verdicts(mine: Tried, others: Sequence[Tried]) -> dict[str, Paired]:
    """The KL of ``mine`` minus that of each of ``others``, by setting, with intervals that hold together: each has a
    level of 1 - `FAMILY` / the number of comparisons (Bonferroni).
    """
    return {one.setting: paired(mine.kl, one.kl, level=1 - FAMILY / len(others)) for one in others}
