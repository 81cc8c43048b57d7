"""Scores of answers (F1, exact match, recall), and paired bootstrap comparisons of systems."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def normalise(text: str) -> str:
    """LongBench's (and SQuAD's) normal form: lower case, no punctuation, no articles, single blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Token F1 of the normal forms, the best over ``answers``: 0..1. It equals ROUGE-1 F over normal forms."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    if not common:
        return 0.0
    return 2 * common / (len(prediction) + len(answer))


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    return float(any(normalise(prediction) == normalise(answer) for answer in answers))


def recall(prediction: str, answers: Sequence[str]) -> float:
    """The share of ``answers`` that occur in the prediction, case-insensitively (RULER's string_match_all): 0..1.

    An empty answer, which occurs in any text, does not count.
    """
    found = [bool(answer.strip()) and answer.lower() in prediction.lower() for answer in answers]
    return sum(found) / max(1, len(found))


def normalised_f1(score: float, naive: float, full: float) -> float | None:
    """The share of plain reuse's loss that is recovered, in percent: 0 is plain reuse, 100 full prefill.

    ``(F1 - F1_naive) / (F1_full - F1_naive) * 100`` of means over the same items, F1 being ROUGE-1 F over normal forms;
    None if plain reuse loses nothing. Source: FusionRAG (arXiv 2601.12904), eq. 11.
    """
    return (score - naive) / (full - naive) * 100 if full != naive else None


LEAST = 6
"""Items that a difference needs at least: five of the same sign occur by chance once in sixteen cases."""


@dataclass(frozen=True)
class Paired:
    """The mean of ``a - b`` over ``items`` pairs, and its bootstrap interval ``low..high``."""

    difference: float
    low: float
    high: float
    items: int

    @property
    def found(self) -> bool:
        """Whether there is a difference: 0 is outside the interval, and there are at least `LEAST` items."""
        return self.items >= LEAST and (self.low > 0 or self.high < 0)


def bootstrap(
    values: Sequence[float], resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval ``(low, high)`` of the mean; the same for the same arguments.

    ``(NaN, NaN)`` for fewer than two values. Source: Efron, 1979.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    step = max(1, 1_000_000 // len(sample))  # draws at a time, so that memory does not grow with the items
    parts = [min(step, resamples - i) for i in range(0, resamples, step)]
    means = np.concatenate(
        [sample[generator.integers(len(sample), size=(part, len(sample)))].mean(axis=1) for part in parts]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired(
    a: Sequence[float], b: Sequence[float], resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Paired:
    """The difference ``a - b`` of two systems on the same items in the same order.

    Pairs are resampled together, so that the difficulty of items cancels out. There is no correction for multiple
    comparisons. Raises ValueError for lists of different length and for empty ones.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"pairs are wanted, not {len(a)} and {len(b)} values")
    differences = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    low, high = bootstrap(differences.tolist(), resamples, level, seed)
    return Paired(float(differences.mean()), low, high, len(differences))
