"""KV of prompt heads: exact, because a head's KV depends on nothing but itself."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
from torch import Tensor

from ..model.canvas import Canvas

WORTH = 8  # tokens; a shorter head is not worth a look-up


class PreambleCache:
    """The latest ``size`` heads (system prompt and instructions before the first chunk), least recently used out first,
    and never more than ``capacity_bytes`` of them. A head that another one begins with is not kept beside it.

    What vLLM and SGLang call prefix caching, for the one prefix that RAG prompts share. Thread-safe.
    """

    def __init__(self, size: int = 8, capacity_bytes: int = 1 << 30) -> None:
        self._size, self._capacity = size, capacity_bytes
        self._heads: OrderedDict[tuple[int, ...], tuple[Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self._heads.values())

    def longest(self, ids: Tensor) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, p, D]`` of the longest common beginning of ``ids [T]`` and any kept head, if worth it."""
        mine = tuple(ids.tolist())
        with self._lock:
            best, length = None, WORTH - 1
            for head in self._heads:
                common = _common(head, mine)
                if common > length:
                    best, length = head, common
            if best is None:
                return None
            self._heads.move_to_end(best)
            keys, values = self._heads[best]
        return keys[:, :, :length], values[:, :, :length]

    def keep(self, ids: Tensor, length: int, canvas: Canvas) -> None:
        """Keep the first ``length`` rows of a finished canvas, all of them computed or exact."""
        head = tuple(ids[:length].tolist())
        if length < WORTH:
            return
        with self._lock:
            if any(known[:length] == head for known in self._heads):
                return
        keys, values = canvas.read(slice(0, length))
        if keys.nbytes + values.nbytes > self._capacity:
            return
        with self._lock:
            for known in [known for known in self._heads if head[: len(known)] == known]:
                del self._heads[known]  # as every turn of a conversation would leave one
            self._heads[head] = keys, values
            while len(self._heads) > self._size or self.nbytes > self._capacity:
                self._heads.popitem(last=False)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    size = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:size]) != np.array(b[:size]))
    return int(different[0]) if len(different) else size
