"""CacheClip: a small model's attention chooses, in windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...spec import at_least
from ..request import Request
from .budget import windows


@dataclass(frozen=True)
class CacheClip:
    """``score[t] = mean_{h, q} A_aux[h, q, t]``: the auxiliary model's attention from the question to the context.

    Its tokens are mapped to the primary model's over character spans, then whole windows of ``window`` tokens that
    hold at least ``threshold`` of the best tokens are recomputed. ``layers``: ``"last"`` as published, or ``"upper"``,
    the mean of the upper half. Where we depart: candidates and windows are counted in the primary's tokens, which meets
    the budget exactly. Source: CacheClip (arXiv 2510.10129).
    """

    window: int = 8
    threshold: int = 5
    layers: Literal["last", "upper"] = "last"

    needs_auxiliary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(1, window=self.window, threshold=self.threshold)

    def select(self, request: Request, budget: int) -> Tensor:
        scores = auxiliary_scores(request, self.layers)
        return request.rows[windows(scores, request.groups, budget, self.window, self.threshold)]


def auxiliary_scores(request: Request, layers: str) -> Tensor:
    """The auxiliary model's score of every row in ``request.rows``: ``[N]`` float32."""
    layout = request.layout
    results = request.auxiliary(layers)
    scores = torch.zeros(len(request.rows))
    for group in request.groups.unique().tolist():
        members = (request.groups == group).nonzero()[:, 0]
        span = layout.spans[group]
        offsets = layout.offsets[request.rows[members]] - (span.start - span.offset)
        scores[members] = torch.from_numpy(results[group].over(offsets.numpy()))
    return scores
