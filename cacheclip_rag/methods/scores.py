"""Hooks that compute what selectors rank tokens by: summed attention scores, and one layer's KV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..compute import LayerInput, StopForward, visible

Normalise = Literal["row", "context", "chunk"]

BLOCK = 1 << 24
"""Attention scores in memory at a time (64 MiB in float32), whatever the number of rows and keys."""


class AttentionScores:
    """A hook that averages the attention from ``rows [R]`` to ``columns [C]`` (slots) over heads, rows and ``layers``.

    ``normalise`` says over which keys the softmax of one row and head runs (docs/methods.md lists the methods):
    ``"row"``: every key the row sees (the model's own probabilities; CacheClip, InfoFlow);
    ``"context"``: the columns only (ProphetKV);
    ``"chunk"``: the columns of each group separately, so that every chunk gets the same mass (FusionRAG).
    ``groups [C]`` int64 is the chunk of each column, with a chunk's columns contiguous; only ``"chunk"`` needs it.
    ``windows``: each layer's sliding window, for ``"row"``; None if no layer has one.

    `scores` is ``[C]`` float32, the mean over layers, heads and rows. Rows must come after the columns.
    """

    def __init__(
        self,
        rows: Tensor,
        columns: Tensor,
        layers: Iterable[int],
        normalise: Normalise = "row",
        groups: Tensor | None = None,
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self.rows, self.columns, self.layers = rows, columns, frozenset(layers)
        self.normalise, self.windows = normalise, windows
        self._length = 1 + max(int(slots.max()) for slots in (rows, columns) if len(slots)) if len(rows) else 0
        if normalise == "chunk":
            if groups is None:
                raise ValueError('normalise="chunk" needs groups, the chunk number of every column')
            self._sizes = groups.unique_consecutive(return_counts=True)[1].tolist()
        self._total = torch.zeros(len(columns), dtype=torch.float32, device=columns.device)
        self._terms = 0

    @property
    def scores(self) -> Tensor:
        return self._total / max(1, self._terms)

    def __call__(self, at: LayerInput) -> None:
        self.add(at.layer, *attending(at, self.rows, self._length), at.scaling)

    def add(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Add one layer's attention: ``query [R, H, D]`` of the rows and ``key [N, Hk, D]`` of the slots, float32."""
        kv_heads, heads = key.shape[1], query.shape[1]
        keys = key.transpose(0, 1).unsqueeze(1)  # [Hk, 1, N, D]: the G = H / Hk query heads of a KV head share its keys
        if self.normalise != "row":
            keys = keys[:, :, self.columns]
        for rows, part in self._blocks(query, keys.shape[2]):
            logits = part.transpose(0, 1).unflatten(0, (kv_heads, -1)) @ keys.mT * scaling  # [Hk, G, R, N]
            self._total += self._mass(layer, rows, logits).sum(dim=(0, 1, 2))
            self._terms += heads * len(rows)

    def _blocks(self, query: Tensor, keys: int) -> Iterable[tuple[Tensor, Tensor]]:
        size = max(1, BLOCK // (query.shape[1] * keys))
        return zip(self.rows.split(size), query.split(size), strict=True)

    def _mass(self, layer: int, rows: Tensor, logits: Tensor) -> Tensor:
        """Probabilities ``[Hk, G, R, C]``."""
        if self.normalise == "row":
            window = None if self.windows is None else self.windows[layer]
            hidden = ~visible(rows, logits.shape[-1], window)
            return logits.masked_fill(hidden, float("-inf")).softmax(dim=-1)[..., self.columns]
        if self.normalise == "context":
            return logits.softmax(dim=-1)
        return torch.cat([part.softmax(dim=-1) for part in logits.split(self._sizes, dim=-1)], dim=-1)


def attending(at: LayerInput, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The queries ``[R, H, D]`` of ``rows [R]`` and the keys ``[length, Hk, D]`` they attend to, float32."""
    keys = at.workspace.placed(at.layer)[0][:length].to(torch.float32, copy=True)
    computed = at.rows < length
    keys[at.rows[computed]] = at.key[computed].float()
    return at.query[torch.searchsorted(at.rows, rows)].float(), keys


class LayerKV:
    """A hook that keeps the ``keys`` and ``values [S, Hk, D]`` that one layer computes, and ends the forward there."""

    keys: Tensor
    values: Tensor

    def __init__(self, layer: int) -> None:
        self.layers = frozenset([layer])

    def __call__(self, at: LayerInput) -> None:
        self.keys, self.values = at.key, at.value
        raise StopForward
