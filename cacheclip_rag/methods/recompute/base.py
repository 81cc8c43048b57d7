"""What a recompute step is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...compute import ScoreMod
from ..request import Request


@dataclass(frozen=True, eq=False)
class Recomputed:
    """The ``logits [1, V]`` of the prompt's last token, and what happened to placed rows, each sorted, int64.

    ``rows [k]``: their stored KV was replaced in at least one layer; ``adjusted [m]``: it was changed without being
    computed.
    """

    logits: Tensor
    rows: Tensor
    adjusted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class Recompute(Protocol):
    """Computes the fresh rows and the chosen ones in the request's workspace. Frozen dataclasses."""

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        """``chosen [k]``: the selector's rows."""
