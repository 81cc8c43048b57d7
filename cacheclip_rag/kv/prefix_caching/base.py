"""What prefix caching is: reuse of KV behind the very same tokens, which changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ...model.canvas import Canvas


class PrefixCache(Protocol):
    """KV of prompts' beginnings, in memory, under a cap in bytes. Not thread-safe: the engine's turns see to that."""

    nbytes: int
    written: int
    """Bytes that were ever kept, those that have gone since included."""

    def longest(self, ids: Tensor, borders: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """KV ``[L, Hk, n_i, D]``, piece by piece from row 0 on, of the longest kept beginning of ``ids [T]``.

        ``borders``: the rows at which the prompt's documents begin, and where the last one ends, sorted.
        """

    def keep(self, ids: Tensor, borders: Sequence[int], canvas: Canvas, seconds_per_token: float) -> None:
        """Keep what a finished prefill left on ``canvas``, every row of which was computed or came from here."""


class PrefixCaching(Protocol):
    """One way of prefix caching: makes a cache. Frozen dataclasses."""

    strategy: ClassVar[str]

    def open(self) -> PrefixCache: ...
