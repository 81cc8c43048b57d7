"""Prefix caching of prompt preambles: the system prompt and instructions before the first chunk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ..model.canvas import Canvas


WORTH = 8
"""Tokens; shorter preambles are not cached."""


class PreambleCache:
    """KV of the ``size`` most recently used preambles (the prompt's tokens before its first chunk), at most
    ``capacity_bytes`` in total.

    This is prefix caching as in vLLM and SGLang, for the one prefix that RAG prompts share. A preamble that is itself
    the beginning of another one is not kept beside it. Thread-safe.
    """

    def __init__(self, size: int = 8, capacity_bytes: int = 1 << 30) -> None:
        self._size, self._capacity = size, capacity_bytes
        self._kept: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._kept.values())

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def longest(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, p, D]`` of the longest common prefix of ``ids [T]`` and any cached preamble; None below `WORTH`
        tokens.
        """
        mine = tuple(ids.tolist())
        with self._lock:
            best, length = None, WORTH - 1
            for preamble in self._kept:
                common = _common(preamble, mine)
                if common > length:
                    best, length = preamble, common
            if best is None:
                return None
            self._kept.move_to_end(best)
            keys, values = self._kept[best]
        return keys[:, :, :length], values[:, :, :length]

    def keep(self, ids: Tensor, length: int, canvas: Canvas) -> None:
        """Cache the first ``length`` rows of a finished canvas: the preamble of the prompt with tokens ``ids [T]``."""
        mine = tuple(ids[:length].tolist())
        if length < WORTH:
            return
        with self._lock:
            if any(known[:length] == mine for known in self._kept):
                return
        keys, values = canvas.read(slice(0, length))
        if keys.nbytes + values.nbytes > self._capacity:
            return
        with self._lock:
            for known in [known for known in self._kept if mine[: len(known)] == known]:
                del self._kept[known]  # otherwise every turn of a conversation would leave one
            self._kept[mine] = keys, values
            while len(self._kept) > self._size or self.nbytes > self._capacity:
                self._kept.popitem(last=False)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:size]) != np.array(b[:size]))
    return int(different[0]) if len(different) else size
