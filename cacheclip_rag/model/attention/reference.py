"""The reference implementation: eager attention in float32, which the other implementations must agree with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...compute import visible
from .mask import SparseRows, trailing


def reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cacheclip: SparseRows | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T * scaling + mask) v`` over ``query [1, H, S, D]``, ``key`` and ``value [1, Hk, N, D]``.

    Returns ``([1, S, H, D]`` in the queries' dtype, probabilities ``[1, H, S, N]`` float32).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    sparse = cacheclip or trailing(query.shape[2], key.shape[2], query.device, query.shape[0])
    layer = int(module.layer_idx)
    sparse.before_attention(layer, query, scaling)
    scores = query.float() @ key.float().repeat_interleave(groups, dim=1).mT * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    mask = visible(sparse.rows, key.shape[2], sliding_window, sparse.floors)
    scores = scores.masked_fill(~mask, float("-inf"))
    if (score_mod := sparse.score_mod_of(layer)) is None:
        probabilities = scores.softmax(dim=-1)
    else:
        grouped = scores[0].unflatten(0, (key.shape[1], groups))
        probabilities = score_mod.probabilities(grouped, sparse.rows, score_mod.prepare(iter([(grouped, sparse.rows)])))
        probabilities = probabilities.flatten(0, 1)[None]
    output = probabilities @ value.float().repeat_interleave(groups, dim=1)
    return output.to(query.dtype).transpose(1, 2).contiguous(), probabilities
