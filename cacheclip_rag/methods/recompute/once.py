"""Recompute the same rows in every layer, in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...compute import Hook, ScoreMod
from ..request import Request, merge_rows
from .base import Recomputed


@dataclass(frozen=True)
class Once:
    """One forward over the fresh and the chosen rows, through all layers. Source: CacheBlend, EPIC."""

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        return Recomputed(compute(request, chosen, score_mod), chosen)


def compute(request: Request, chosen: Tensor, score_mod: ScoreMod | None, hooks: Sequence[Hook] = ()) -> Tensor | None:
    """Compute the fresh and the chosen rows in all layers; returns the logits ``[1, V]`` of the prompt's last token,
    None with ``request.logits=0``.
    """
    part = request.part(merge_rows(request.fresh, chosen), hooks=hooks, score_mod=score_mod)
    [logits] = request.computer.forward([part], logits=request.logits)
    return logits
