"""Automatic prefix caching in blocks of tokens, as in vLLM."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from ...spec import at_least
from .base import PrefixCache

if TYPE_CHECKING:
    from ...model.canvas import Canvas


@dataclass(frozen=True)
class PrefixBlocks:
    """Full blocks of ``block`` tokens, each identified by a hash of its tokens and of all blocks before it.

    The tail of up to ``block - 1`` tokens and the prompt's last token are always computed. The least recently used
    blocks are evicted first; of one prompt, the deepest. Source: automatic prefix caching in vLLM.
    """

    block: int = 16
    capacity_bytes: int = 1 << 30

    strategy: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        at_least(1, block=self.block, capacity_bytes=self.capacity_bytes)

    def open(self) -> PrefixCache:
        return _Blocks(self.block, self.capacity_bytes)


class _Blocks:
    def __init__(self, block: int, capacity: int) -> None:
        self._block, self._capacity = block, capacity
        self._kept: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()
        self.nbytes = self.written = 0

    def longest(self, ids: Tensor, borders: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        found = []
        for name in self._names(ids[:-1]):
            if name not in self._kept:
                break
            found.append(name)
        for name in reversed(found):  # the deepest block is evicted first
            self._kept.move_to_end(name)
        return [self._kept[name] for name in found]

    def keep(self, ids: Tensor, borders: Sequence[int], canvas: Canvas, seconds_per_token: float) -> None:
        names = list(self._names(ids))
        for number, name in reversed(list(enumerate(names))):
            if name not in self._kept:
                kv = canvas.read(slice(number * self._block, (number + 1) * self._block))
                self._kept[name] = kv
                self.nbytes += (size := sum(t.nbytes for t in kv))
                self.written += size
            self._kept.move_to_end(name)
        while self.nbytes > self._capacity:
            _, kv = self._kept.popitem(last=False)
            self.nbytes -= sum(t.nbytes for t in kv)

    def _names(self, ids: Tensor) -> Iterator[bytes]:
        name = b""
        for start in range(0, len(ids) - self._block + 1, self._block):
            tokens = ids[start : start + self._block].numpy().tobytes()
            name = hashlib.blake2b(name + tokens, digest_size=16).digest()
            yield name
