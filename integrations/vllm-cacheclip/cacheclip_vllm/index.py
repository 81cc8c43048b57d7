"""Known chunks in a prompt, by token ids: all that vLLM's scheduler sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ANCHOR = 16
"""Tokens of an anchor. Any common stretch of twice as many, less one, contains one; shorter ones are not reused."""
BORDER = 2
"""A chunk's first tokens without an anchor: what stands before it in a prompt may be merged with them."""
MAX_CANDIDATES = 32
"""Of chunks that share an anchor, as many are compared with the prompt; the longest match wins."""
_FIRST = 64
"""Tokens that a candidate is compared with at first; twice as many each time that all are equal."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.array([pow(int(_BASE), k, 1 << 64) for k in range(ANCHOR)], dtype=np.uint64)


@dataclass(frozen=True)
class Match:
    """Prompt rows ``[row, row + length)`` hold the tokens of the chunk ``name`` from ``offset`` on."""

    row: int
    name: str
    offset: int
    length: int


class TokenIndex:
    """Finds the token ids of known chunks in a prompt's. Not thread-safe.

    Anchors are windows of `ANCHOR` tokens at 2, 18, 34, ... of each chunk, by hash and sorted. One binary search finds
    all of a prompt's windows among them, so the work is some ``T log A`` for T tokens and A anchors, in numpy. Hashes
    only nominate; token ids decide.
    """

    def __init__(self) -> None:
        self._ids: dict[str, np.ndarray] = {}
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}  # by number; a chunk that comes back has a new one
        self._next = 0
        self._hashes = np.zeros(0, dtype=np.uint64)  # sorted
        self._places = np.zeros(0, dtype=np.int64)  # number << 32 | offset, of each hash
        self._added: list[tuple[np.ndarray, np.ndarray]] = []
        self._removed: set[int] = set()
        self.compared = 0
        """Tokens that the last `find` compared."""

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, name: str) -> bool:
        return name in self._ids

    def names(self) -> set[str]:
        return set(self._ids)

    def ids(self, name: str) -> np.ndarray:
        """A chunk's token ids ``[n]`` int64."""
        return self._ids[name]

    def add(self, name: str, ids: Sequence[int] | np.ndarray) -> None:
        """Make a chunk's tokens known as ``name``; nothing changes if the name is known."""
        if name in self._ids:
            return
        mine = np.asarray(ids, dtype=np.int64)
        number, self._next = self._next, self._next + 1
        self._ids[name], self._numbers[name], self._names[number] = mine, number, name
        hashes = window_hashes(mine)
        if len(hashes):
            offsets = np.arange(min(BORDER, len(hashes) - 1), len(hashes), ANCHOR, dtype=np.int64)
            self._added.append((hashes[offsets], (number << 32) + offsets))

    def remove(self, name: str) -> None:
        if self._ids.pop(name, None) is not None:
            number = self._numbers.pop(name)
            del self._names[number]
            self._removed.add(number)

    def find(self, prompt: Sequence[int] | np.ndarray) -> list[Match]:
        """The known stretches of a prompt's token ids, disjoint and in order: greedy from the left, the longest match
        at each place, of equal ones the one nearest to its chunk's start.
        """
        self._settle()
        self.compared = 0
        ids = np.asarray(prompt, dtype=np.int64)
        windows = window_hashes(ids)
        if not len(self._hashes) or not len(windows):
            return []
        first = np.searchsorted(self._hashes, windows)
        hits = np.flatnonzero(self._hashes[first.clip(max=len(self._hashes) - 1)] == windows)
        found: list[Match] = []
        taken = 0
        for row in hits.tolist():
            if row >= taken and (match := self._longest(ids, row, int(first[row]), taken)) is not None:
                found.append(match)
                taken = match.row + match.length
        return found

    def _longest(self, ids: np.ndarray, row: int, first: int, taken: int) -> Match | None:
        """The longest match with an anchor at ``row``; none of it before the row ``taken``."""
        best = None
        for place in self._places[first : first + MAX_CANDIDATES][
            self._hashes[first : first + MAX_CANDIDATES] == self._hashes[first]
        ].tolist():
            name, offset = self._names[place >> 32], place & 0xFFFFFFFF
            chunk = self._ids[name]
            back = self._common(ids[taken:row][::-1], chunk[:offset][::-1])
            length = back + self._common(ids[row:], chunk[offset:])
            if length < back + ANCHOR:
                continue
            if best is None or (length, back - offset) > (best.length, -best.offset):
                best = Match(row - back, name, offset - back, length)
        return best

    def _common(self, a: np.ndarray, b: np.ndarray) -> int:
        """How many elements from the first on are equal. Looks at few more: a prompt of a long chunk's anchors in
        another order would otherwise be compared with the whole chunk at each of them.
        """
        size, start, step = min(len(a), len(b)), 0, _FIRST
        while start < size:
            different = np.flatnonzero(a[start : min(start + step, size)] != b[start : min(start + step, size)])
            self.compared += min(step, size - start)
            if len(different):
                return start + int(different[0])
            start, step = start + step, 2 * step
        return size

    def _settle(self) -> None:
        """Merge what was added and removed into the sorted anchors."""
        if self._removed:
            kept = ~np.isin(self._places >> 32, np.fromiter(self._removed, dtype=np.int64))
            self._hashes, self._places = self._hashes[kept], self._places[kept]
            self._added = [each for each in self._added if int(each[1][0] >> 32) not in self._removed]
            self._removed.clear()
        if self._added:
            hashes, places = (np.concatenate(each) for each in zip(*self._added, strict=True))
            order = np.argsort(hashes, kind="stable")
            at = np.searchsorted(self._hashes, hashes[order], side="right")
            self._hashes = np.insert(self._hashes, at, hashes[order])
            self._places = np.insert(self._places, at, places[order])
            self._added.clear()


def window_hashes(ids: np.ndarray) -> np.ndarray:
    """The hash of each window of `ANCHOR` neighbouring token ids, ``[n - ANCHOR + 1]`` uint64."""
    count = len(ids) - ANCHOR + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    mixed = (ids.astype(np.uint64) + np.uint64(1)) * _BASE
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(count, dtype=np.uint64)
    for k, power in enumerate(_POWERS):
        total += mixed[k : k + count] * power
    return total
