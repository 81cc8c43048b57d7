"""The selector of plain reuse: no context token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..request import Request


@dataclass(frozen=True)
class Nothing:
    """Recompute no context token: stored KV is only rotated to its position. Source: PromptCache ("full reuse")."""

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        return request.rows[:0]
