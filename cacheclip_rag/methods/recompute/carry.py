"""Recompute the same rows in every layer, and adjust the other tokens of their chunks by the mean change."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...compute import LayerInput, ScoreMod
from ...errors import ConfigurationError
from ..request import Request
from .base import Recomputed
from .once import Once, compute


@dataclass(frozen=True)
class Carry:
    """Add the mean change of a chunk's recomputed tokens to the KV of its other tokens.

    A chunk encoded in isolation lacks the effect of preceding text on its KV, and much of that effect is the same for
    all its tokens (docs/analyses.md): a few recomputed tokens estimate it. In every layer and KV head, after the chosen
    rows' K' and V' are computed and before they are attended to, with C_c the chosen rows of chunk c, C those of all
    such chunks, and R(p) the rotation to position p,

        d_i = R(-p_i) (K'_i - K_i)       clipped to at most ``carry`` times the median norm of all d
        K_j += R(p_j) (sum_{i in C_c} d_i + w d) / (|C_c| + w)       for every row j of c that was not chosen

    where d is the mean over C with the weight of ``weight`` = w rows, so that chunks with few chosen rows are pulled
    towards the mean of all chunks. Values likewise, without the rotation. It needs no further forward: one sum and one
    addition per layer.

    At half the median norm nearly every d is clipped, so the mean is one of directions: long if they agree, short if
    not, and no single token dominates. With the plain mean, a few tokens whose KV changes completely (attention sinks
    of the isolated chunk) turned some right answers into wrong ones (docs/log.md).

    Fused chunks are not changed and contribute nothing: their context has had its effect already. If all chunks but the
    first are fused, nothing is adjusted, since only the prompt's preamble precedes the first. ``carry=0`` is `Once`.
    Our own method.
    """

    carry: float = 0.5
    weight: float = 4.0

    def __post_init__(self) -> None:
        if not self.carry >= 0.0 or not self.weight >= 0.0:
            raise ConfigurationError(f"carry and weight must be at least 0, not {self.carry} and {self.weight}")

    def run(self, request: Request, chosen: Tensor, score_mod: ScoreMod | None) -> Recomputed:
        alone = torch.tensor([chunk is not None and not chunk.context for chunk in request.chunks], dtype=torch.bool)
        rest = request.rows[~torch.isin(request.rows, chosen)]
        seen, rest = (rows[alone[request.layout.chunk[rows]]] for rows in (chosen, rest))
        fused = not alone.all() and not alone[1:].any()
        if not self.carry or fused or not len(seen) or not len(rest):
            return Once().run(request, chosen, score_mod)
        logits = compute(request, chosen, score_mod, hooks=[CarryOver(request, seen, rest, self.carry, self.weight)])
        return Recomputed(logits, chosen, adjusted=rest)


class CarryOver:
    """A hook that adjusts the rows ``rest [m]`` of each layer by the mean change of the rows ``chosen [k]``."""

    layers = None

    def __init__(self, request: Request, chosen: Tensor, rest: Tensor, carry: float, weight: float) -> None:
        computer, layout, positions = request.computer, request.layout, request.positions
        device = computer.device
        self._chosen, self._rest = chosen.to(device), rest.to(device)
        self._to_zero = computer.rotation(-positions[chosen].to(device))
        self._to_place = computer.rotation(positions[rest].to(device))
        self._groups, self._targets = layout.chunk[chosen].to(device), layout.chunk[rest].to(device)
        self._counts = torch.bincount(self._groups, minlength=len(layout.spans))[:, None, None]
        self._carry, self._weight = carry, weight

    def __call__(self, at: LayerInput) -> None:
        mine = torch.searchsorted(at.rows, self._chosen)
        keys, values = at.workspace.placed(at.layer)
        key_change = at.key[mine].float() - keys[self._chosen].float()
        value_change = at.value[mine].float() - values[self._chosen].float()
        moved = self._to_place(self._mean(self._to_zero(key_change, at.layer)), at.layer)
        at.workspace.write_layer(
            at.layer,
            self._rest,
            keys[self._rest] + moved.to(keys.dtype),
            values[self._rest] + self._mean(value_change).to(values.dtype),
        )

    def _mean(self, change: Tensor) -> Tensor:
        """Changes ``[k, Hk, D]`` float32 of the chosen rows to ``[m, Hk, D]`` for the rest: their chunks' means."""
        length = change.norm(dim=-1, keepdim=True)
        most = self._carry * length.median(dim=0, keepdim=True).values
        change = change * (most / length.clamp_min(1e-12)).clamp(max=1.0)
        each = change.new_zeros(len(self._counts), *change.shape[1:])
        each.index_add_(0, self._groups, change)
        each += self._weight * change.mean(dim=0, keepdim=True)
        return (each / (self._counts + self._weight).clamp_min(1e-12))[self._targets]
