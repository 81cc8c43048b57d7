"""The interface of a selector."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from ..request import Request


class Selector(Protocol):
    """Chooses the rows to recompute. Frozen dataclasses."""

    needs_auxiliary: ClassVar[bool]

    def select(self, request: Request, budget: int) -> Tensor:
        """At most ``budget`` of ``request.rows``, sorted, int64."""
