"""Fewer rows in the upper layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...model.attention import AttentionProbe, Shape
from ..request import Request
from .base import merge_rows


@dataclass(frozen=True)
class EarlyStop:
    """From the relative ``depth`` on, only chunks that the question focuses on are recomputed any further.

    These are the fewest chunks that together hold ``share`` of the attention which the question, in the layers so far,
    paid to context tokens; the chosen rows of all others stop there, and their deeper KV stays as stored. When that is
    every chunk, nothing stops. Where focus begins is our reading: the paper reports that it shows by layers 10 to 15
    of 32 for most questions. Source: Cache-Craft (arXiv 2502.15734), adaptive early termination.
    """

    depth: float = 0.4
    share: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.depth < 1 or not 0 < self.share <= 1:
            raise ConfigurationError(f"depth and share must lie between 0 and 1, not {self.depth} and {self.share}")

    def run(self, request: Request, chosen: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
        backbone, canvas, device = request.backbone, request.canvas, request.backbone.device
        rows = merge_rows(request, chosen)
        layer = min(max(1, round(self.depth * backbone.layers)), backbone.layers - 1)
        looked = [i for i in backbone.full_layers if i < layer]
        question = request.question_rows if len(request.question_rows) else request.fresh[-1:]
        behind = len(request.rows) and int(question[0]) > int(request.rows[-1])
        probe = None
        if looked and behind and self.share < 1:
            probe = AttentionProbe(question.to(device), request.rows.to(device), looked)
        stream = backbone.advance(
            request.layout.ids[rows],
            rows,
            canvas,
            0,
            layer,
            positions=request.positions[rows],
            probe=probe,
            shape=shape,
        )
        if probe is not None:
            kept = merge_rows(
                request, chosen[torch.isin(request.layout.chunk[chosen], self._focus(request, probe.scores.cpu()))]
            )
            stream, rows = stream[torch.isin(rows, kept).to(device)], kept
        logits = backbone.forward(stream, rows, canvas, positions=request.positions[rows], first=layer, shape=shape)
        assert logits is not None
        return logits, chosen

    def _focus(self, request: Request, scores: Tensor) -> Tensor:
        """The numbers of the chunks in focus."""
        numbers, index = request.groups.unique(return_inverse=True)
        mass = torch.zeros(len(numbers)).index_add_(0, index, scores)
        order = mass.argsort(descending=True)
        held = mass[order].cumsum(dim=0) / mass.sum()
        return numbers[order[: int((held < self.share - 1e-6).sum()) + 1]]
