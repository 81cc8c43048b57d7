"""Automatic prefix caching in blocks of tokens, as in vLLM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...deprecation import dropped_parameters
from ...spec import at_least
from ...store import LRUCache, MemoryBudget
from .base import KIND, PrefixCache

if TYPE_CHECKING:
    from ...model.canvas import Canvas


@dropped_parameters(capacity_bytes="prefix caches share the engine's memory_bytes")
@dataclass(frozen=True)
class PrefixBlocks:
    """Full blocks of ``block`` tokens, each identified by a hash of its tokens and of all blocks before it.

    The tail of up to ``block - 1`` tokens and the prompt's last token are always computed. The least recently used
    blocks are evicted first; of one prompt, the deepest. Source: automatic prefix caching in vLLM.
    """

    block: int = 16

    strategy: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        at_least(1, block=self.block)

    def open(self, memory: MemoryBudget) -> PrefixCache:
        return _Blocks(self.block, memory)


class _Blocks:
    def __init__(self, block: int, memory: MemoryBudget) -> None:
        self._block, self.written = block, 0
        self._kept: LRUCache[bytes, tuple[Tensor, Tensor]] = LRUCache(memory, KIND)

    @property
    def nbytes(self) -> int:
        return self._kept.nbytes

    def longest(self, ids: Tensor, borders: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        names = list(takewhile(self._kept.__contains__, self._names(ids[:-1])))
        found: list[tuple[Tensor, Tensor]] = []
        for name in reversed(names):  # the deepest block is evicted first
            kv = self._kept.get(name)
            found = [] if kv is None else [kv, *found]  # one that has just been evicted ends what is behind it
        return found

    def keep(self, ids: Tensor, borders: Sequence[int], canvas: Canvas, seconds_per_token: float) -> None:
        for number, name in reversed(list(enumerate(self._names(ids)))):
            if self._kept.get(name) is None:
                kv = canvas.read(slice(number * self._block, (number + 1) * self._block))
                size = sum(t.nbytes for t in kv)
                self.written += size if self._kept.put(name, kv, size) else 0

    def clear(self) -> None:
        self._kept.clear()

    def _names(self, ids: Tensor) -> Iterator[bytes]:
        name = b""
        for start in range(0, len(ids) - self._block + 1, self._block):
            tokens = ids[start : start + self._block].numpy().tobytes()
            name = hashlib.blake2b(name + tokens, digest_size=16).digest()
            yield name
