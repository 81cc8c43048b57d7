"""The selector of full prefill: every context token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..request import Request


@dataclass(frozen=True)
class Everything:
    """Recompute every context token: full prefill, which every other method equals at ratio 1."""

    needs_auxiliary: ClassVar[bool] = False
    strategy: ClassVar[str] = "full"

    def select(self, request: Request, budget: int) -> Tensor:
        return request.rows
