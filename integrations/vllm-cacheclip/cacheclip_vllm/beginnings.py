"""The exact beginnings of prompts, by single tokens: vLLM's prefix cache shares whole blocks, and a block with a filled
row in it is private. So a system prompt that ends in the block where the first chunk begins would be computed each
time.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from torch import Tensor

ROWS = 1024
"""Rows that are kept in all, on the device of the model."""


class Beginnings:
    """KV of the rows that stood before the first chunk of earlier prompts; the least recently used ones go first.

    Whoever may share vLLM's prefix cache shares these, told by its ``salt``. Each rank keeps its own heads. All ranks
    make the same calls, so that none computes what another has.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, bytes], tuple[np.ndarray, Tensor, Tensor]] = OrderedDict()

    def find(self, salt: str, ids: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """KV ``[L, Hk, n, D]`` of the longest beginning of ``ids`` that was kept, or None."""
        best, length = None, 0
        for name, (known, _, _) in self._kept.items():
            if name[0] == salt and (common := _common(known, ids)) > length:
                best, length = name, common
        if best is None:
            return None
        self._kept.move_to_end(best)
        _, keys, values = self._kept[best]
        return keys[:, :, :length], values[:, :, :length]

    def keep(self, salt: str, ids: np.ndarray, keys: Tensor, values: Tensor) -> None:
        """Keep the KV ``[L, Hk, n, D]`` of ``ids [n]``, and no longer that of any beginning of them."""
        if len(ids) > ROWS:
            return
        for name, (known, _, _) in list(self._kept.items()):
            if name[0] == salt and _common(known, ids) == len(known):
                del self._kept[name]
        self._kept[salt, ids.tobytes()] = ids, keys, values
        while sum(len(known) for known, _, _ in self._kept.values()) > ROWS:
            self._kept.popitem(last=False)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids two prompts begin with in common."""
    size = min(len(a), len(b))
    different = np.flatnonzero(a[:size] != b[:size])
    return int(different[0]) if len(different) else size
