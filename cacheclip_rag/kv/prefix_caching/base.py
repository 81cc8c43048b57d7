"""The interface of prefix caching: reuse of KV behind exactly the same tokens, so that the result does not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from ...model.canvas import Canvas
    from ...store import MemoryBudget

KIND = "prefix caches"
"""What `MemoryBudget.by_kind` calls them."""


class PrefixCache(Protocol):
    """KV of prompt prefixes, within a `MemoryBudget`: any of it may be gone at the next look."""

    @property
    def nbytes(self) -> int: ...

    written: int
    """Bytes written so far, including those evicted since."""

    def longest(self, ids: Tensor, borders: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """KV ``[L, Hk, n_i, D]``, piece by piece from row 0 on, of the longest cached prefix of ``ids [T]``.

        ``borders``: the rows at which the prompt's documents begin, and where the last one ends, sorted.
        """

    def keep(self, ids: Tensor, borders: Sequence[int], canvas: Canvas, seconds_per_token: float) -> None:
        """Cache the rows of a finished prefill of ``ids [T]``, all of them computed or taken from this cache."""

    def clear(self) -> None: ...


class PrefixCaching(Protocol):
    """A kind of prefix cache and its parameters; `open` makes one. Frozen dataclasses."""

    strategy: ClassVar[str]

    def open(self, memory: MemoryBudget) -> PrefixCache: ...
