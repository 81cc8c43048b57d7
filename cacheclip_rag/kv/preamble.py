"""KV of prompt preambles: what stands before the first chunk depends on nothing but itself, so its KV is exact."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from ..model.canvas import Canvas


WORTH = 8
"""Tokens; a shorter preamble is not worth a look-up."""


class PreambleCache:
    """The latest ``size`` preambles (system prompt and instructions before the first chunk), least recently used out
    first, and never more than ``capacity_bytes`` of them. One that another begins with is not kept beside it.

    What vLLM and SGLang call prefix caching, for the one prefix that RAG prompts share. Thread-safe.
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
        """KV ``[L, Hk, p, D]`` of the longest common beginning of ``ids [T]`` and any kept preamble, if worth it."""
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
        """Keep the first ``length`` rows of a finished canvas, all of them computed by a full prefill of them."""
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
                del self._kept[known]  # as every turn of a conversation would leave one
            self._kept[mine] = keys, values
            while len(self._kept) > self._size or self.nbytes > self._capacity:
                self._kept.popitem(last=False)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:size]) != np.array(b[:size]))
    return int(different[0]) if len(different) else size
