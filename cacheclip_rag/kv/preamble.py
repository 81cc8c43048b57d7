"""Prefix caching of prompt preambles: the system prompt and instructions before the first chunk."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..store import LRUCache, MemoryBudget

if TYPE_CHECKING:
    from ..model.canvas import Canvas


WORTH = 8
"""Tokens; shorter preambles are not cached."""


class PreambleCache:
    """KV of at most ``size`` preambles (the prompt's tokens before its first chunk), the most recently used ones,
    within the ``memory`` budget.

    This is prefix caching as in vLLM and SGLang, for the one prefix that RAG prompts share. A preamble that is itself
    the beginning of another one is not kept beside it. Thread-safe.
    """

    def __init__(self, memory: MemoryBudget, size: int = 8) -> None:
        self._size = size
        self._kept: LRUCache[tuple[int, ...], tuple[Tensor, Tensor]] = LRUCache(memory, "preambles")
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def clear(self) -> None:
        self._kept.clear()

    def longest(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, p, D]`` of the longest common prefix of ``ids [T]`` and any cached preamble; None below `WORTH`
        tokens.
        """
        mine = tuple(ids.tolist())
        with self._lock:
            best, length = None, WORTH - 1
            for preamble, _ in self._kept.items():
                common = _common(preamble, mine)
                if common > length:
                    best, length = preamble, common
            kept = None if best is None else self._kept.get(best)  # it may have been evicted just now
        return None if kept is None else (kept[0][:, :, :length], kept[1][:, :, :length])

    def keep(self, ids: Tensor, length: int, canvas: Canvas) -> None:
        """Cache the first ``length`` rows of a finished canvas: the preamble of the prompt with tokens ``ids [T]``."""
        mine = tuple(ids[:length].tolist())
        if length < WORTH:
            return
        with self._lock:
            if any(known[:length] == mine for known, _ in self._kept.items()):
                return
        keys, values = canvas.read(slice(0, length))
        with self._lock:
            known = [preamble for preamble, _ in self._kept.items()]
            if not self._kept.put(mine, (keys, values), keys.nbytes + values.nbytes):
                return
            for preamble in known:
                if mine[: len(preamble)] == preamble:  # otherwise every turn of a conversation would leave one
                    self._kept.pop(preamble)
            for preamble, _ in self._kept.items()[: -self._size]:
                self._kept.pop(preamble)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:size]) != np.array(b[:size]))
    return int(different[0]) if len(different) else size
