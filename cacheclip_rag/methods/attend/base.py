"""What a way of attending is, and the ordinary one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ...model.attention import Shape
from ..request import Request


class Attend(Protocol):
    """Makes one request's `Shape`. Frozen dataclasses."""

    def shape(self, request: Request, chosen: Tensor) -> Shape | None:
        """How rows weigh what they see, now that ``chosen [k]`` rows will be recomputed; None for plain attention."""


@dataclass(frozen=True)
class Plain:
    """Softmax over everything a row sees."""

    def shape(self, request: Request, chosen: Tensor) -> Shape | None:
        return None
