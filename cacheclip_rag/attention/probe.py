"""Onlookers of a forward: attention summed up without keeping it, and an early end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from .mask import Enough

Normalise = Literal["row", "context", "chunk"]


class AttentionProbe:
    """Sums attention from ``rows [R]`` (slots) to ``columns [C]`` (slots), over heads, rows and layers.

    ``normalise`` says over what the softmax of one row and head runs (methods.md calls the choice A16 and 18.1):
    ``"row"``: every key the row sees (the model's own probabilities; CacheClip, InfoFlow);
    ``"context"``: the columns only (ProphetKV);
    ``"chunk"``: the columns of each group by themselves, so that every chunk gets the same mass (FusionRAG).
    ``groups [C]`` int64 numbers the chunks from 0 and is needed for ``"chunk"`` only.

    `scores` is ``[C]`` float32, the mean over layers, heads and rows. Rows must stand behind the columns, and layers
    must be full-attention ones (`Backbone.full_layers`): a sliding window is not applied.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        layers: Iterable[int],
        normalise: Normalise = "row",
        groups: Tensor | None = None,
    ) -> None:
        self.rows, self.columns, self.layers = rows, columns, frozenset(layers)
        self.normalise, self.groups = normalise, groups
        self._total = torch.zeros(len(columns), dtype=torch.float32, device=columns.device)
        self._terms = 0

    @property
    def scores(self) -> Tensor:
        return self._total / max(1, self._terms)

    def __call__(self, layer: int, query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> None:
        mine = torch.searchsorted(rows, self.rows)
        # [Hk, G, R, D] x [Hk, 1, N, D]: the G = H / Hk query heads of a KV head share its keys.
        q = query[0, :, mine].float().unflatten(0, (key.shape[1], -1))
        if self.normalise == "row":
            logits = (q @ key[0].float().unsqueeze(1).mT) * scaling
            hidden = torch.arange(key.shape[2], device=rows.device) > self.rows[:, None]
            mass = logits.masked_fill_(hidden, float("-inf")).softmax(dim=-1)[..., self.columns]
        else:
            logits = (q @ key[0][:, self.columns].float().unsqueeze(1).mT) * scaling
            alone = self.normalise == "chunk"
            mass = _softmax_by_group(logits, self._groups()) if alone else logits.softmax(dim=-1)
        self._total += mass.sum(dim=(0, 1, 2))
        self._terms += q.shape[0] * q.shape[1] * q.shape[2]

    def _groups(self) -> Tensor:
        if self.groups is None:
            raise ValueError('normalise="chunk" needs groups, the chunk number of every column')
        return self.groups


class StopAt:
    """Ends a forward at a layer, when its keys are written and before they are attended to."""

    def __init__(self, layer: int) -> None:
        self.layers = frozenset([layer])

    def __call__(self, layer: int, query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> None:
        raise Enough


def _softmax_by_group(logits: Tensor, groups: Tensor) -> Tensor:
    """Softmax of ``logits [..., C]`` inside each of the groups that ``groups [C]`` numbers."""
    index = groups.expand_as(logits)
    shape = (*logits.shape[:-1], int(groups.max()) + 1)
    peak = logits.new_full(shape, float("-inf")).scatter_reduce(-1, index, logits, "amax")
    powers = (logits - peak.gather(-1, index)).exp()
    return powers / logits.new_zeros(shape).scatter_add(-1, index, powers).gather(-1, index)
