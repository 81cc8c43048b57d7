"""The question attends to a few chunks only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...errors import ConfigurationError
from ...model.attention import Shape, TopChunks
from ..request import Request


@dataclass(frozen=True)
class SelectedChunks:
    """SEL: in every layer the question sees the ``keep`` chunks it likes best, and what belongs to no chunk.

    ``best``: how many of a chunk's largest probabilities make its score; see `TopChunks`. A question that joins more
    chunks than ``keep`` cannot be answered. Source: SEL (arXiv 2412.16545), aggregation HT, K = 2.
    """

    keep: int = 2
    best: int = 5

    def __post_init__(self) -> None:
        if self.keep < 1 or self.best < 1:
            raise ConfigurationError(f"keep and best must be at least 1, not {self.keep} and {self.best}")

    def shape(self, request: Request, chosen: Tensor) -> Shape | None:
        groups = request.layout.chunk.clone()
        groups[request.fresh] = -1
        if not bool((groups >= 0).any()):
            return None
        start = int((groups >= 0).nonzero()[-1]) + 1
        return TopChunks(groups.to(request.backbone.device), self.keep, self.best, start, len(groups))
