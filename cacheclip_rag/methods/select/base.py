"""What a selector is."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from ..request import Request


class Selector(Protocol):
    """Chooses rows. Frozen dataclasses."""

    needs_auxiliary: ClassVar[bool]

    def select(self, request: Request, budget: int) -> Tensor:
        """``[budget]`` (at most) of ``request.rows``, sorted, int64."""
