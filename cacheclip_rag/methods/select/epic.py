"""EPIC's selector: the leading tokens of every chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...spec import at_least
from ..request import Request
from .budget import top


@dataclass(frozen=True)
class LeadingTokens:
    """EPIC: the first tokens of every chunk, which acted as attention sinks when it was encoded in isolation.

    ``tokens=k`` takes the first k of each, whatever the ratio (LegoLink-k); None takes the first ``r |C_i|`` of each,
    as the study (arXiv 2603.20218) does to compare methods at one ratio. A chunk in place (right behind its encode
    prefix) is not recomputed. Source: EPIC (arXiv 2410.15332), LegoLink; without its repeated begin-of-sequence tokens.
    """

    tokens: int | None = None

    needs_auxiliary: ClassVar[bool] = False

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens)

    def select(self, request: Request, budget: int) -> Tensor:
        place, length = places(request.groups)
        if self.tokens is not None:
            return request.rows[place < self.tokens]
        return request.rows[top(-(place + 1) / length, budget)]


def places(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's index in its chunk, from 0, and the chunk's length, both ``[N]``, for the chunks ``groups [N]``."""
    same = groups[:, None] == groups.unique()[None]
    count = same.cumsum(dim=0)
    place = torch.where(same, count - 1, 0).sum(dim=1)
    length = torch.where(same, count[-1], 0).sum(dim=1)
    return place, length
