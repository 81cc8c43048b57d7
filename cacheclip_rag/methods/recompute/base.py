"""The interface of a recompute step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...compute import ScoreMod
from ..request import Request


@dataclass(frozen=True, eq=False)
class Recomputed:
    """The result of a recompute step: ``logits [1, V]`` of the last token (None with ``request.logits=0``), and
    which placed rows changed.

    ``rows [k]`` int64, sorted: stored KV was recomputed in at least one layer; ``adjusted [m]`` int64, sorted: stored
    KV was changed without recomputing it.
    """

    logits: Tensor | None
    rows: Tensor
    adjusted: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class Recompute(Protocol):
    """Computes the fresh and the chosen rows of a request. Frozen dataclasses."""

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        """Compute ``request.fresh`` and the selector's rows ``chosen [k]`` in the request's workspace."""
