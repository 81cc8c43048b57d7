"""Sharper attention into stored context, and less of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...errors import ConfigurationError
from ...model.attention import ScaledContext, Shape
from ...spec import at_least
from ..request import Request


@dataclass(frozen=True)
class Scaled:
    """APE: attention to context tokens at ``temperature`` T, their log-sum-exp times ``mass``; see `ScaledContext`.

    The context is every token whose stored KV is used as it is: what is recomputed or fresh is not scaled, as PSR has
    it; APE recomputes nothing. ``mass=None`` takes S T for the published ``scale`` S, which is what the released code
    multiplies by (its paper says S). ``rows``: ``"all"`` scales for every computed row, ``"question"``
    only for those behind the last chunk. ``first``: layers below attend plainly.
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

    def shape(self, request: Request, chosen: Tensor) -> Shape | None:
        mass = self.scale * self.temperature if self.mass is None else self.mass
        if self.temperature == 1.0 and mass == 1.0:
            return None
        context = request.layout.reusable.clone()
        context[request.fresh] = False
        start = int(context.nonzero()[-1]) + 1 if self.rows == "question" and bool(context.any()) else 0
        context[chosen] = False
        if not bool(context.any()):
            return None
        return ScaledContext(context.to(request.backbone.device), self.temperature, mass, first=self.first, start=start)
