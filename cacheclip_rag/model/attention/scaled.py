"""A temperature and a scale on the context's share of attention."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


class ScaledContext:
    """``softmax over [z_C / T + (s - 1) LSE(z_C / T), z_O]``: sharper inside the context, the context lighter overall.

    ``context [n]`` bool marks the slots of C, everything else is O; ``temperature`` = T; ``mass`` = s, the factor on
    the context's log-sum-exp; rows before the slot ``start`` attend plainly. One softmax that equals the published
    merge of two, since ``sum_j exp(z_Cj + (s - 1) LSE_C) = exp(s LSE_C)``. A row that sees nothing of C is not changed.
    Source: APE (arXiv 2502.05431), section 4; PSR (arXiv 2603.20218) with C = what was not recomputed.
    """

    def __init__(self, context: Tensor, temperature: float, mass: float, *, first: int = 0, start: int = 0) -> None:
        self.context, self.temperature, self.mass = context, temperature, mass
        self.first, self.start = first, start

    def survey(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> None:
        return None

    def weigh(self, logits: Tensor, rows: Tensor, plan: None) -> Tensor:
        missing = logits.shape[-1] - len(self.context)  # slots that decoding added
        inside = F.pad(self.context, (0, missing)) if missing > 0 else self.context[: logits.shape[-1]]
        sharp = logits / self.temperature
        total = sharp.masked_fill(~inside, float("-inf")).logsumexp(dim=-1, keepdim=True)
        shift = torch.where(total.isinf(), 0.0, (self.mass - 1.0) * total)
        shaped = torch.where(inside, sharp + shift, logits)
        return torch.where((rows >= self.start)[:, None], shaped, logits).softmax(dim=-1)
