"""The request and the result of a prefill."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods import Method
from ..model.canvas import Canvas
from ..prompt import Layout
from ..report import Report
from ..serving.hints import Hints


@dataclass(frozen=True)
class PrefillRequest:
    """A prompt to prefill: at most the share ``ratio`` of its placed tokens is recomputed; tokens without stored KV are
    always computed.

    ``room``: slots for the answer (tokens). Optional: ``question`` is the question's text; ``hints`` holds what
    retrievers announced, of which the ``caller``'s counts.
    """

    prompt: str
    method: Method
    ratio: float
    room: int = 256
    question: str | None = None
    hints: Hints | None = None
    caller: Hashable = None


@dataclass(frozen=True, eq=False)
class Prefill:
    """A prefilled prompt: its KV on ``canvas``, and the ``logits [1, V]`` of its last token.

    ``layout`` is of the prompt's text; soft tokens (`Report.soft_tokens`) have slots of the canvas besides. ``canvas``
    is None for a model served by plain prefill. ``step`` is the decoding step for `Backbone.generate`.
    """

    layout: Layout
    canvas: Canvas | None
    logits: Tensor
    report: Report
    step: Callable[[Tensor, int], Tensor]

    def forced(self, answer: Sequence[int]) -> Tensor:
        """Teacher-forced logits ``[n, V]`` at the positions of the n tokens of ``answer``.

        They are computed by the method's own decoding step, since some methods modify attention scores in decoding as
        well; all tokens in one step, which costs little more than one token.
        """
        if len(answer) < 2:
            return self.logits
        return torch.cat([self.logits, self.step(torch.tensor(answer[:-1]), len(self.layout))])
