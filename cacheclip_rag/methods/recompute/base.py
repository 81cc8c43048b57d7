"""What carries rows through the layers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...model.attention import Shape
from ..request import Request


class Recompute(Protocol):
    """Computes the fresh rows and the chosen ones on the request's canvas. Frozen dataclasses."""

    def run(self, request: Request, chosen: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
        """``chosen [k]``: the selector's rows. Returns the logits ``[1, V]`` of the prompt's last token and the rows
        ``[k']``, sorted, whose stored KV was replaced in at least one layer.
        """


def merge_rows(request: Request, chosen: Tensor) -> Tensor:
    """The fresh rows and the chosen ones, sorted."""
    return torch.cat([request.fresh, chosen]).sort().values
