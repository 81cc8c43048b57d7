"""The same rows in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...model.attention import Shape
from ..request import Request
from .base import merge_rows


@dataclass(frozen=True)
class Once:
    """One forward over the fresh and the chosen rows."""

    def run(self, request: Request, chosen: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
        rows = merge_rows(request, chosen)
        logits = request.backbone.forward(
            request.layout.ids[rows], rows, request.canvas, positions=request.positions[rows], shape=shape
        )
        assert logits is not None
        return logits, chosen
