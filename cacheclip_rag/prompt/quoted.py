"""Exact search for many whole texts in a prompt, in time that depends on the prompt's length only."""

from __future__ import annotations

import random
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from .rendered import Stretch

_MODULI = (2**31 - 1, 2**31 - 19)
_BEGINNING = 64
"""Beginnings of this length are looked for first: nearly all of a prompt begins no text."""
_BLOCK = 1 << 15
"""Places that are looked at together: so many fit into a core's cache."""

Numbers = NDArray[np.uint64]


class WholeTexts:
    """Texts of at least 64 characters, found by hashes of their beginnings.

    A text of length 0b1011 is kept by its beginnings of 0b1000, 0b1010 and 0b1011 characters. For one place of a
    prompt, trying the bits from the highest one on, and keeping those whose beginning is known, ends at the longest
    beginning that may matter; each beginning knows the longest text that it begins with. (Binary search on prefix
    lengths, Waldvogel and others, SIGCOMM 1997.) Hashes are polynomials modulo two primes, with bases drawn when the
    process starts, so nobody can write texts that share one.
    """

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, dict[int, int]]] = {}
        self._table: tuple[Numbers, list[tuple[Numbers, NDArray[np.int64]]]] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, key: str, text: str) -> None:
        sums = _sums(text)
        lengths = [_BEGINNING]
        for bit in reversed(range(len(text).bit_length())):
            if len(text) >> bit & 1:
                lengths.append(len(text) >> bit << bit)
        hashes = _hashes(sums, _starts(sums, np.zeros(1, dtype=np.int64)), np.array(lengths))
        self._texts[key] = text, dict(zip(lengths, hashes.tolist(), strict=True))
        self._table = None

    def remove(self, key: str) -> None:
        if self._texts.pop(key, None) is not None:
            self._table = None

    def cover(self, prompt: str) -> list[Stretch]:
        """The characters of the prompt where one of the texts stands, in disjoint stretches and in order."""
        if not self._texts or len(prompt) < _BEGINNING:
            return []
        sums = _sums(prompt)
        count = len(prompt) - _BEGINNING + 1
        found = [self._found(sums, first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]
        places, ends = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if not len(places):
            return []
        ends = np.maximum.accumulate(ends)
        breaks = np.flatnonzero(places[1:] > ends[:-1]) + 1
        firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]]) - 1
        return list(zip(places[firsts].tolist(), ends[lasts].tolist(), strict=True))

    def _found(self, sums: list[Numbers], first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The places from ``first`` to ``stop`` at which a text stands, and where the longest text there ends."""
        beginnings, by_bit = self._tables()
        characters = len(sums[0]) - 1
        places = np.arange(first, stop)
        places = places[_among(_hashes(sums, _starts(sums, places), places + _BEGINNING), beginnings)[0]]
        starts, reached, ends = _starts(sums, places), places, places
        for bit, (known, longest) in reversed(list(enumerate(by_bit))):
            if not len(known):
                continue
            tried = np.minimum(reached + (1 << bit), characters)
            hit, at = _among(_hashes(sums, starts, tried), known)
            hit &= tried - reached == 1 << bit
            reached = np.where(hit, tried, reached)
            ends = np.where(hit, places + longest[at], ends)
        return places[ends > places], ends[ends > places]

    def _tables(self) -> tuple[Numbers, list[tuple[Numbers, NDArray[np.int64]]]]:
        """Hashes of the texts' first characters; by the lowest bit of their lengths, hashes of the texts' beginnings,
        and how long the longest text is that stands at the beginning of each.
        """
        if self._table is None:
            longest: list[dict[int, int]] = [{} for _ in range(64)]
            chain: list[str] = []  # texts that the current one begins with
            for text, hashes in sorted(self._texts.values(), key=lambda entry: entry[0]):
                while chain and not text.startswith(chain[-1]):
                    chain.pop()
                chain.append(text)
                for length, value in hashes.items():
                    at = bisect_right(chain, length, key=len)
                    longest[(length & -length).bit_length() - 1][value] = len(chain[at - 1]) if at else 0
            beginnings = sorted({hashes[_BEGINNING] for _, hashes in self._texts.values()})
            self._table = (
                np.array(beginnings, dtype=np.uint64),
                [
                    (np.array(sorted(each), dtype=np.uint64), np.array([each[v] for v in sorted(each)], dtype=np.int64))
                    for each in longest
                ],
            )
        return self._table


_bases = [random.SystemRandom().randrange(2**16, modulus - 1) for modulus in _MODULI]
_powers: list[tuple[Numbers, Numbers]] = [(np.ones(1, np.uint64), np.ones(1, np.uint64)) for _ in _MODULI]


def _grown(powers: Numbers, base: int, modulus: int, count: int) -> Numbers:
    """The powers of ``base``, at least ``count`` of them."""
    while len(powers) < count:
        step = np.uint64(pow(base, len(powers), modulus))
        powers = np.concatenate([powers, powers * step % np.uint64(modulus)])
    return powers


def _sums(text: str) -> list[Numbers]:
    """For each modulus the running sums of characters times powers, from which `_hashes` takes any stretch's."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.uint64) + np.uint64(1)
    sums = []
    for number, modulus in enumerate(_MODULI):
        forth, back = _powers[number]
        if len(forth) < len(codes) + 1:
            base = _bases[number]
            forth = _grown(forth, base, modulus, len(codes) + 1)
            back = _grown(back, pow(base, -1, modulus), modulus, len(codes) + 1)
            _powers[number] = forth, back
        running = np.cumsum(codes * forth[: len(codes)] % np.uint64(modulus), dtype=np.uint64) % np.uint64(modulus)
        sums.append(np.concatenate([np.zeros(1, np.uint64), running]))
    return sums


def _starts(sums: list[Numbers], places: NDArray[np.int64]) -> list[tuple[Numbers, Numbers]]:
    """What `_hashes` needs of the stretches that begin at ``places``."""
    return [
        (np.uint64(modulus) - sums[number][places], _powers[number][1][places])
        for number, modulus in enumerate(_MODULI)
    ]


def _hashes(sums: list[Numbers], starts: list[tuple[Numbers, Numbers]], ends: NDArray[np.int64]) -> Numbers:
    """The hashes of the stretches that begin at `_starts` and end before ``ends``."""
    parts = []
    for (less, power), running, modulus in zip(starts, sums, _MODULI, strict=True):
        product = (running[ends] + less) * power
        parts.append(product - product // np.uint64(modulus) * np.uint64(modulus))  # faster than %
    return (parts[0] << np.uint64(32)) ^ parts[1]


def _among(values: Numbers, known: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the values are known, and where (sorted)."""
    at = np.searchsorted(known, values).clip(max=len(known) - 1)
    return known[at] == values, at
