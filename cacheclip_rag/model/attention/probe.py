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

    ``normalise`` says over what the softmax of one row and head runs (docs/methods.md says which method takes which):
    ``"row"``: every key the row sees (the model's own probabilities; CacheClip, InfoFlow);
    ``"context"``: the columns only (ProphetKV);
    ``"chunk"``: the columns of each group by themselves, so that every chunk gets the same mass (FusionRAG).
    ``groups [C]`` int64 says which chunk a column belongs to, a chunk's columns standing together, and is needed for
    ``"chunk"`` only.

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
            parts = logits.split(self._sizes() if self.normalise == "chunk" else len(self.columns), dim=-1)
            mass = torch.cat([part.softmax(dim=-1) for part in parts], dim=-1)
        self._total += mass.sum(dim=(0, 1, 2))
        self._terms += q.shape[0] * q.shape[1] * q.shape[2]

    def _sizes(self) -> list[int]:
        if self.groups is None:
            raise ValueError('normalise="chunk" needs groups, the chunk number of every column')
        sizes: list[int] = self.groups.unique_consecutive(return_counts=True)[1].tolist()
        return sizes


class StopAt:
    """Ends a forward at a layer, when its keys are written and before they are attended to."""

    def __init__(self, layer: int) -> None:
        self.layers = frozenset([layer])

    def __call__(self, layer: int, query: Tensor, key: Tensor, rows: Tensor, scaling: float) -> None:
        raise Enough
