"""Tokens drawn by lot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..request import Request


@dataclass(frozen=True)
class Random:
    """What any method that claims to choose must beat: ``budget`` tokens, all equally likely.

    ``seed`` and the prompt's tokens decide, so a prompt gets the same tokens every time.
    """

    seed: int = 0

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        weights = torch.arange(1, len(request.layout) + 1)
        # The CPU's generator looks at the lowest 32 bits of a seed only, so both must be in them.
        seed = int((request.layout.ids * weights).sum()) + 0x9E3779B1 * self.seed
        generator = torch.Generator().manual_seed(seed % 2**32)
        return request.rows[torch.randperm(len(request.rows), generator=generator)[:budget].sort().values]
