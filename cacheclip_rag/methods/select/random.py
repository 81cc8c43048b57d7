"""The selector that draws tokens at random: the baseline of every other one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..request import Request


@dataclass(frozen=True)
class Random:
    """``budget`` tokens, drawn uniformly at random: the baseline that any selector must beat.

    ``seed`` and the prompt's tokens seed the draw, so that a prompt gets the same tokens every time.
    """

    seed: int = 0

    needs_auxiliary: ClassVar[bool] = False

    def select(self, request: Request, budget: int) -> Tensor:
        weights = torch.arange(1, len(request.layout) + 1)
        # The CPU's generator uses the lowest 32 bits of a seed only, so both must be mixed into them.
        seed = int((request.layout.ids * weights).sum()) + 0x9E3779B1 * self.seed
        generator = torch.Generator().manual_seed(seed % 2**32)
        return request.rows[torch.randperm(len(request.rows), generator=generator)[:budget].sort().values]
