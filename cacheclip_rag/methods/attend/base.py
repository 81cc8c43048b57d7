"""The interface of an attention variant, and plain attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...compute import ScoreMod
from ..request import Request


class Attend(Protocol):
    """Makes the score modification of one request. Frozen dataclasses."""

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        """The score modification, given the rows ``chosen [k]`` to recompute; None for plain attention."""


@dataclass(frozen=True)
class Plain:
    """Ordinary attention: softmax over every slot that a row sees."""

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        return None
