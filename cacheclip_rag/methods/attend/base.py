"""What a way of attending is, and the ordinary one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...compute import ScoreMod
from ..request import Request


class Attend(Protocol):
    """Makes one request's score modification. Frozen dataclasses."""

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        """How rows weigh what they see, now that ``chosen [k]`` rows will be recomputed; None for plain attention."""


@dataclass(frozen=True)
class Plain:
    """Softmax over everything a row sees."""

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        return None
