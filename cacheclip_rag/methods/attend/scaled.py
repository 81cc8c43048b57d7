"""APE's attention: a temperature and a scale on the reused context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compute import ScoreMod
from ...errors import ConfigurationError
from ...spec import at_least
from ..request import Request


@dataclass(frozen=True)
class Scaled:
    """APE: attention to context tokens at ``temperature`` T, their log-sum-exp times ``mass``; see `ScaledContext`.

    The context is every token whose stored KV is used unchanged. Recomputed and fresh tokens are not scaled, as in PSR;
    APE recomputes nothing. ``mass=None`` takes S T for the published ``scale`` S, which is what the released code
    multiplies by (the paper says S). ``rows``: ``"all"`` scales for every computed row, ``"question"`` only for those
    behind the last chunk. ``first``: the first layer with scaling; lower ones use plain attention.
    Source: APE (arXiv 2502.05431), PSR (arXiv 2603.20218).
    """

    temperature: float = 0.9
    scale: float = 0.9
    mass: float | None = None
    rows: Literal["all", "question"] = "all"
    first: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigurationError(f"temperature must be above 0, not {self.temperature}; 1 changes nothing")
        if not (self.scale if self.mass is None else self.mass) >= 0:
            raise ConfigurationError(f"scale must not be below 0, not {self.scale}; 1 changes nothing")
        at_least(0, first=self.first)

    def score_mod(self, request: Request, chosen: Tensor) -> ScoreMod | None:
        mass = self.scale * self.temperature if self.mass is None else self.mass
        if self.temperature == 1.0 and mass == 1.0:
            return None
        context = request.layout.reusable.clone()
        context[request.fresh] = False
        start = int(context.nonzero()[-1]) + 1 if self.rows == "question" and bool(context.any()) else 0
        context[chosen] = False
        if not bool(context.any()):
            return None
        device = request.computer.device
        return ScaledContext(context.to(device), self.temperature, mass, first_layer=self.first, start=start)


class ScaledContext:
    """``softmax over [z_C / T + (s - 1) LSE(z_C / T), z_O]``: sharper within the context C, which gets less mass.

    ``context [n]`` bool marks the slots of C, all others are O; ``temperature`` = T; ``mass`` = s, the factor on the
    context's log-sum-exp; rows before the slot ``start`` use plain attention. This single softmax equals the published
    merge of two, since ``sum_j exp(z_Cj + (s - 1) LSE_C) = exp(s LSE_C)``. A row that sees no slot of C is unchanged.
    Source: APE (arXiv 2502.05431), section 4; PSR (arXiv 2603.20218) with C = tokens that were not recomputed.
    """

    def __init__(
        self, context: Tensor, temperature: float, mass: float, *, first_layer: int = 0, start: int = 0
    ) -> None:
        self.context, self.temperature, self.mass = context, temperature, mass
        self.first_layer, self.start = first_layer, start

    def prepare(self, blocks: Iterator[tuple[Tensor, Tensor]]) -> None:
        return None

    def probabilities(self, logits: Tensor, rows: Tensor, plan: None) -> Tensor:
        missing = logits.shape[-1] - len(self.context)  # slots that decoding added
        inside = F.pad(self.context, (0, missing)) if missing > 0 else self.context[: logits.shape[-1]]
        sharp = logits / self.temperature
        total = sharp.masked_fill(~inside, float("-inf")).logsumexp(dim=-1, keepdim=True)
        shift = torch.where(total.isinf(), 0.0, (self.mass - 1.0) * total)
        shaped = torch.where(inside, sharp + shift, logits)
        return torch.where((rows >= self.start)[:, None], shaped, logits).softmax(dim=-1)
