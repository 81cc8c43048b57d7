"""DroidSpeak's second selection: other rows from a deeper layer on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compute import ScoreMod
from ...errors import ConfigurationError
from ..request import Request, merge_rows
from ..scores import LayerKV
from ..select.budget import top
from ..select.cacheblend import deviation
from .base import Recomputed
from .once import Once


@dataclass(frozen=True)
class Reselect:
    """DroidSpeak for chunks: the first selection's rows up to the transition layer, then a new one of the same size.

    The residual stream entering ``transition_layer`` is fresh for the rows computed so far, and the stored activation
    (`WithActivations`, at the same layer) for all others. That layer runs over all rows, the next layer's keys are
    compared with the stored ones, and the rows that deviate most continue from there. Comparing stored activations with
    themselves would always give 0, hence the one dense layer (our reading: docs/methods.md).
    Source: the study's adaptation (arXiv 2603.20218) of DroidSpeak (arXiv 2411.02820).
    """

    transition_layer: int = 4

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        if not len(chosen):
            return Once().run(request, chosen, score_mod)
        computer = request.computer
        layer = min(self.transition_layer, computer.layers - 2) + 1
        rows = merge_rows(request.fresh, chosen)
        everything = merge_rows(request.rows, request.fresh)
        [fresh] = computer.advance([request.part(rows, score_mod=score_mod)], 0, layer - 1)
        stream = torch.empty(len(request.layout), fresh.shape[-1], dtype=fresh.dtype, device=fresh.device)
        stream[request.rows] = _activations(request).to(fresh)
        stream[rows] = fresh
        [dense] = computer.advance([request.part(everything, stream[everything])], layer - 1, layer)
        stream[everything] = dense

        again = request.rows[top(self._deviation(request, everything, dense, layer).cpu(), len(chosen))]
        rows = merge_rows(request.fresh, again)
        [logits] = computer.forward([request.part(rows, stream[rows], score_mod=score_mod)], first=layer)
        assert logits is not None
        return Recomputed(logits, torch.cat([chosen, again]).unique())

    @staticmethod
    def _deviation(request: Request, rows: Tensor, stream: Tensor, layer: int) -> Tensor:
        """``[N]``: how far the stored keys of ``layer`` are from those that the residual stream ``[S, d]`` gives."""
        scratch, fresh = request.computer.workspace(len(request.layout), layers=layer + 1), LayerKV(layer)
        part = request.part(rows, stream, hooks=[fresh], workspace=scratch)
        request.computer.forward([part], first=layer, depth=layer + 1, logits=0)
        keys = fresh.keys.new_zeros(len(request.layout), *fresh.keys.shape[1:])
        keys[rows] = fresh.keys
        return deviation(request, keys, keys, layer)


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
