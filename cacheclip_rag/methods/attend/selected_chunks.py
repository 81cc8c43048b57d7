"""SEL's attention: the question attends to a few chunks only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...compute import ScoreMod
from ...errors import ConfigurationError
from ..request import Request


@dataclass(frozen=True)
class SelectedChunks:
    """SEL: in every layer the question attends to its ``keep`` highest-scoring chunks, and to all text outside chunks.

    ``best``: how many of a chunk's largest probabilities make up its score; see `TopChunks`. A question that needs more
    than ``keep`` chunks at once cannot be answered. Source: SEL (arXiv 2412.16545), aggregation HT, K = 2.
    """

    keep: int = 2
    best: int = 5

    def __post_init__(self) -> None:
        if self.keep < 1 or self.best < 1:
            raise ConfigurationError(f"keep and best must be at least 1, not {self.keep} and {self.best}")

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        groups = request.layout.chunk.clone()
        groups[request.fresh] = -1
        if not bool((groups >= 0).any()):
            return None
        start = int((groups >= 0).nonzero()[-1]) + 1
        return TopChunks(groups.to(request.computer.device), self.keep, self.best, start, len(groups))


class TopChunks:
    """The question attends to the ``keep`` chunks with the highest attention scores, chosen anew in every layer.

    A chunk's score for a head and row is the sum of its ``best`` largest probabilities; scores are summed over heads
    and the question's rows (aggregation HT). All other chunks are masked for all of these rows, which renormalises the
    rest. ``groups [n]`` int64: the chunk of each slot, -1 for none; rows in ``[start, stop)`` are the question; later
    ones are decoded tokens, each with a choice of its own; earlier ones use plain attention.
    Source: SEL (arXiv 2412.16545), section 4.
    """

    def __init__(self, groups: Tensor, keep: int, best: int, start: int, stop: int, *, first_layer: int = 0) -> None:
        self.groups, self.keep, self.best, self.first_layer = groups, keep, best, first_layer
        self.start, self.stop = start, stop
        self._members = [(groups == g).nonzero()[:, 0] for g in groups[groups >= 0].unique()]

    def prepare(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Scores ``[chunks]`` summed over the question's heads and rows."""
        total = torch.zeros(len(self._members), device=self.groups.device)
        for logits, rows in blocks:
            mine = (rows >= self.start) & (rows < self.stop)
            if bool(mine.any()):
                total += self._scores(logits[:, :, mine].softmax(dim=-1)).sum(dim=0)
        return total

    def probabilities(self, logits: Tensor, rows: Tensor, plan: Tensor) -> Tensor:
        scores = torch.where((rows >= self.stop)[:, None], self._scores(logits.softmax(dim=-1)), plan)  # [R, chunks]
        if self.keep < len(self._members):
            hidden = torch.zeros(len(rows), logits.shape[-1], dtype=torch.bool, device=logits.device)
            kept = scores.topk(self.keep, dim=-1).indices
            for number, members in enumerate(self._members):
                hidden[:, members] = ~(kept == number).any(dim=-1, keepdim=True)
            logits = logits.masked_fill(hidden & (rows >= self.start)[:, None], float("-inf"))
        return logits.softmax(dim=-1)

    def _scores(self, probabilities: Tensor) -> Tensor:
        """``[R, chunks]``: the sum over heads of the sum of each chunk's largest probabilities."""
        columns = [
            probabilities[..., members].topk(min(self.best, len(members)), dim=-1).values.sum(dim=(0, 1, 3))
            for members in self._members
        ]
        return torch.stack(columns, dim=-1)
