"""Cache-Craft's early termination: fewer rows in the upper layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compute import ScoreMod
from ...errors import ConfigurationError
from ..request import Request, merge_rows
from ..scores import AttentionScores
from .base import Recomputed


@dataclass(frozen=True)
class EarlyStop:
    """From the relative ``depth`` on, recompute only the rows of chunks that the question focuses on.

    These are the fewest chunks that together hold ``share`` of the question's attention to context tokens in the layers
    below; the chosen rows of all other chunks stop there, and their KV above stays as stored. If every chunk is in
    focus, nothing stops. The default depth is our reading: the paper reports that the focus shows by layers 10 to 15 of
    32 for most questions. Source: Cache-Craft (arXiv 2502.15734), adaptive early termination.
    """

    depth: float = 0.4
    share: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.depth < 1 or not 0 < self.share <= 1:
            raise ConfigurationError(f"depth and share must lie between 0 and 1, not {self.depth} and {self.share}")

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        computer, rows = request.computer, merge_rows(request.fresh, chosen)
        layer = min(max(1, round(self.depth * computer.layers)), computer.layers - 1)
        scores = self._scores(request, layer)
        hooks = [] if scores is None else [scores]
        [stream] = computer.advance([request.part(rows, hooks=hooks, score_mod=score_mod)], 0, layer)
        if scores is not None:
            in_focus = torch.isin(request.layout.chunk[chosen], self._focus(request, scores.scores.cpu()))
            kept = merge_rows(request.fresh, chosen[in_focus])
            stream, rows = stream[torch.isin(rows, kept).to(stream.device)], kept
        [logits] = computer.forward([request.part(rows, stream, score_mod=score_mod)], first=layer)
        assert logits is not None
        return Recomputed(logits, chosen)

    def _scores(self, request: Request, layer: int) -> AttentionScores | None:
        """A hook that sums the question's attention below ``layer``; None if that cannot separate chunks."""
        computer = request.computer
        looked = [i for i in computer.full_layers if i < layer]
        question = request.question_rows if len(request.question_rows) else request.fresh[-1:]
        behind = len(request.rows) and int(question[0]) > int(request.rows[-1])
        if not looked or not behind or self.share >= 1:
            return None
        device = computer.device
        return AttentionScores(question.to(device), request.rows.to(device), looked, windows=computer.windows)

    def _focus(self, request: Request, scores: Tensor) -> Tensor:
        """The numbers of the chunks in focus."""
        numbers, index = request.groups.unique(return_inverse=True)
        mass = torch.zeros(len(numbers), dtype=torch.float32).index_add_(0, index, scores)
        order = mass.argsort(descending=True)
        held = mass[order].cumsum(dim=0) / mass.sum()
        return numbers[order[: int((held < self.share - 1e-6).sum()) + 1]]
