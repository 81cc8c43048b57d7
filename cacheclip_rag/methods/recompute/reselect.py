"""Other rows from a deeper layer on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigurationError
from ...model.attention import Shape, StopAt
from ..request import Request
from ..select import top
from ..select.cacheblend import deviation
from .base import merge_rows
from .once import Once


@dataclass(frozen=True)
class Reselect:
    """DroidSpeak for chunks: the first selection's rows up to the transition layer, then a new one of the same size.

    The residual stream entering ``transition_layer`` is the fresh one for the rows computed so far and the stored
    activation (`WithActivations`, of that very layer) for all others. That layer runs over all rows, the next one's
    keys are compared with the stored ones, and the rows that deviate most go on from there. Comparing stored
    activations with themselves would always give 0, hence the one dense layer (our reading: docs/methods.md).
    Source: the study's adaptation (arXiv 2603.20218) of DroidSpeak (arXiv 2411.02820).
    """

    transition_layer: int = 4

    def run(self, request: Request, chosen: Tensor, shape: Shape | None) -> tuple[Tensor, Tensor]:
        if not len(chosen):
            return Once().run(request, chosen, shape)
        backbone, canvas, layout = request.backbone, request.canvas, request.layout
        layer = min(self.transition_layer, backbone.layers - 2) + 1
        rows = merge_rows(request, chosen)
        fresh = backbone.advance(
            layout.ids[rows], rows, canvas, 0, layer - 1, positions=request.positions[rows], shape=shape
        )
        everything = torch.cat([request.rows, request.fresh]).sort().values
        stream = torch.empty(len(layout), fresh.shape[-1], dtype=fresh.dtype, device=fresh.device)
        stream[request.rows] = _activations(request).to(fresh)
        stream[rows] = fresh
        dense = backbone.advance(
            stream[everything], everything, canvas, layer - 1, layer, positions=request.positions[everything]
        )
        stream[everything] = dense

        scratch = backbone.canvas(len(layout), layers=layer + 1)
        backbone.forward(
            stream[everything],
            everything,
            scratch,
            positions=request.positions[everything],
            logits=0,
            probe=StopAt(layer),
            first=layer,
            depth=layer + 1,
        )
        scores = deviation(request, scratch.keys[layer, 0], scratch.values[layer, 0], layer)
        again = request.rows[top(scores.cpu(), len(chosen))]
        rows = merge_rows(request, again)
        logits = backbone.forward(
            stream[rows], rows, canvas, positions=request.positions[rows], first=layer, shape=shape
        )
        assert logits is not None
        return logits, torch.cat([chosen, again]).unique()


def _activations(request: Request) -> Tensor:
    """``[N, d]``: the stored residual stream of every row in ``request.rows``."""
    span, token = request.layout.chunk[request.rows], request.layout.token[request.rows]
    parts = []
    for number in span.unique_consecutive().tolist():
        chunk = request.chunks[number]
        if chunk is None or "activations" not in chunk.extra:
            raise ConfigurationError('re-selection needs chunks with stored activations, as "droidspeak" encodes them')
        parts.append(chunk.extra["activations"][token[span == number]])
    return torch.cat(parts)
