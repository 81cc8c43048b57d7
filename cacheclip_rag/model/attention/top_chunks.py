"""Only the chunks that matter are attended to."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class TopChunks:
    """The question attends to the ``keep`` chunks whose best tokens it likes most, chosen anew in every layer.

    A chunk's score for a head and row is the sum of its ``best`` largest probabilities; scores are summed over heads
    and the question's rows (aggregation HT), and every other chunk is hidden from all of them, which renormalises the
    rest. ``groups [n]`` int64: the chunk of each slot, -1 for none; rows in ``[start, stop)`` are the question, later
    ones are decoded tokens, which choose each for itself; earlier ones attend plainly.
    Source: SEL (arXiv 2412.16545), section 4.
    """

    def __init__(self, groups: Tensor, keep: int, best: int, start: int, stop: int, *, first: int = 0) -> None:
        self.groups, self.keep, self.best, self.first = groups, keep, best, first
        self.start, self.stop = start, stop
        self._members = [(groups == g).nonzero()[:, 0] for g in groups[groups >= 0].unique()]

    def survey(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """Scores ``[chunks]`` summed over the question's heads and rows."""
        total = torch.zeros(len(self._members), device=self.groups.device)
        for logits, rows in blocks:
            mine = (rows >= self.start) & (rows < self.stop)
            if bool(mine.any()):
                total += self._scores(logits[:, :, mine].softmax(dim=-1)).sum(dim=0)
        return total

    def weigh(self, logits: Tensor, rows: Tensor, plan: Tensor) -> Tensor:
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
