"""What a prefill is asked for, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import Method
from ..model.canvas import Canvas
from ..prompt import Layout
from ..report import Report


@dataclass(frozen=True)
class PrefillRequest:
    """A prompt to prefill: at most ``ratio`` of its placed tokens are recomputed, next to all that has no stored KV.

    ``room``: slots for the answer (tokens). ``question`` (its text) and ``hints`` (names of chunks) are advice.
    """

    prompt: str
    method: Method
    ratio: float
    room: int = 256
    question: str | None = None
    hints: Collection[str] = ()


@dataclass(frozen=True, eq=False)
class Prefill:
    """A prompt whose KV stands on a canvas: ``logits [1, V]`` of its last token, and everything to go on from there.

    ``canvas`` is None for a model served by plain prefill. ``step`` is what `Backbone.generate` decodes with.
    """

    layout: Layout
    canvas: Canvas | None
    logits: Tensor
    report: Report
    step: Callable[[Tensor, int], Tensor]

    def forced(self, answer: Sequence[int]) -> Tensor:
        """Logits ``[n, V]`` of the n answer tokens' positions, the answer given.

        By the method's own decoding step, since some methods modify scores while decoding, too; all tokens at once,
        which costs little more than one.
        """
        if len(answer) < 2:
            return self.logits
        return torch.cat([self.logits, self.step(torch.tensor(answer[:-1]), len(self.layout))])
