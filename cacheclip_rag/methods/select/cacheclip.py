"""CacheClip's selector: an auxiliary model's attention from the question, in groups of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...deprecation import renamed_parameters
from ...spec import at_least
from ..request import Request
from .budget import top_groups


@renamed_parameters(window="group_size")
@dataclass(frozen=True)
class CacheClip:
    """``score[t] = mean_{h, q} A_aux[h, q, t]``: the auxiliary model's attention from the question to the context.

    Scores are mapped to the primary model's tokens over character spans. Then whole groups of ``group_size`` adjacent
    tokens are recomputed that contain at least ``threshold`` of the highest-scoring tokens. ``layers``: ``"last"`` as
    published, or ``"upper"``, the mean of the upper half. Unlike in the paper, candidates and groups are counted in
    tokens of the primary model, so that the budget is used up exactly. Source: CacheClip (arXiv 2510.10129).
    """

    group_size: int = 8
    threshold: int = 5
    layers: Literal["last", "upper"] = "last"

    needs_auxiliary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(1, group_size=self.group_size, threshold=self.threshold)

    def select(self, request: Request, budget: int) -> Tensor:
        scores = auxiliary_scores(request, self.layers)
        return request.rows[top_groups(scores, request.groups, budget, self.group_size, self.threshold)]


def auxiliary_scores(request: Request, layers: str) -> Tensor:
    """The auxiliary model's score of every row in ``request.rows``: ``[N]`` float32."""
    layout = request.layout
    results = request.auxiliary(layers)
    scores = torch.zeros(len(request.rows), dtype=torch.float32)
    for group in request.groups.unique().tolist():
        members = (request.groups == group).nonzero()[:, 0]
        span = layout.spans[group]
        offsets = layout.offsets[request.rows[members]] - (span.start - span.offset)
        scores[members] = torch.from_numpy(results[group].over(offsets.numpy()))
    return scores
