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
        self._table: tuple[Numbers, Numbers, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, key: str, text: str) -> None:
        sums = _sums(text)
        lengths = [_BEGINNING]
        for bit in reversed(range(len(text).bit_length())):
            if len(text) >> bit & 1:
                lengths.append(len(text) >> bit << bit)
        places = np.zeros(len(lengths), dtype=np.int64)
        self._texts[key] = text, dict(zip(lengths, _hashes(sums, places, np.array(lengths)).tolist(), strict=True))
        self._table = None

    def remove(self, key: str) -> None:
        if self._texts.pop(key, None) is not None:
            self._table = None

    def cover(self, prompt: str) -> list[Stretch]:
        """The characters of the prompt where one of the texts stands, in disjoint stretches and in order."""
        if not self._texts or len(prompt) < _BEGINNING:
            return []
        beginnings, known, longest = self._tables()
        sums = _sums(prompt)
        places = np.arange(len(prompt) - _BEGINNING + 1)
        places = places[_among(_hashes(sums, places, np.full(len(places), _BEGINNING)), beginnings)[0]]
        lengths, found = np.zeros(len(places), dtype=np.int64), np.zeros(len(places), dtype=np.int64)
        for bit in reversed(range(max(len(text) for text, _ in self._texts.values()).bit_length())):
            rows = np.flatnonzero(places + lengths + (1 << bit) <= len(prompt))
            tried = lengths[rows] + (1 << bit)
            hit, at = _among(_hashes(sums, places[rows], tried), known)
            lengths[rows[hit]], found[rows[hit]] = tried[hit], longest[at[hit]]
        places, ends = places[found > 0], (places + found)[found > 0]
        if not len(places):
            return []
        ends = np.maximum.accumulate(ends)
        breaks = np.flatnonzero(places[1:] > ends[:-1]) + 1
        firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]]) - 1
        return list(zip(places[firsts].tolist(), ends[lasts].tolist(), strict=True))

    def _tables(self) -> tuple[Numbers, Numbers, NDArray[np.int64]]:
        """Hashes of the texts' first characters; hashes of their beginnings, and how long the longest text is that
        stands at the beginning of each.
        """
        if self._table is None:
            longest: dict[int, int] = {}
            chain: list[str] = []  # texts that the current one begins with
            for text, hashes in sorted(self._texts.values(), key=lambda entry: entry[0]):
                while chain and not text.startswith(chain[-1]):
                    chain.pop()
                chain.append(text)
                for length, value in hashes.items():
                    at = bisect_right(chain, length, key=len)
                    longest[value] = len(chain[at - 1]) if at else 0
            beginnings = sorted({hashes[_BEGINNING] for _, hashes in self._texts.values()})
            known = sorted(longest)
            self._table = (
                np.array(beginnings, dtype=np.uint64),
                np.array(known, dtype=np.uint64),
                np.array([longest[value] for value in known], dtype=np.int64),
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
        running = np.cumsum(codes * forth[: len(codes)] % np.uint64(modulus), dtype=np.uint64)
        sums.append(np.concatenate([np.zeros(1, np.uint64), running]))
    return sums


def _hashes(sums: list[Numbers], places: NDArray[np.int64], lengths: NDArray[np.int64]) -> Numbers:
    """The hashes of the stretches that begin at ``places`` and have these ``lengths``."""
    parts = []
    for number, modulus in enumerate(_MODULI):
        stretch = (sums[number][places + lengths] - sums[number][places]) % np.uint64(modulus)
        parts.append(stretch * _powers[number][1][places] % np.uint64(modulus))
    mixed = (parts[0] << np.uint64(32)) ^ parts[1]
    return mixed ^ (lengths.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _among(values: Numbers, known: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the values are known, and where (sorted)."""
    at = np.searchsorted(known, values).clip(max=len(known) - 1)
    return known[at] == values, at
