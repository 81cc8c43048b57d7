"""The default implementation: PyTorch's fused attention over blocks of rows, each against the keys it can see."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Sparse, trailing, visible
from .reference import reference_attention

BLOCK = 256  # rows a block: the mask stays small, and few keys beyond a row's own slot are computed in vain


def sdpa_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cacheclip: Sparse | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse causal attention of ``query [1, H, S, D]`` over ``key`` and ``value [1, Hk, N, D]``.

    Rows are sorted, so a block of them needs keys only up to its last row's slot. In grouped-query models the H / Hk
    query heads that share a KV head are folded into the row dimension instead of repeating K and V.
    Returns ``([1, S, H, D], None)``, equal to `reference_attention` up to rounding.
    """
    if softcap is not None:  # the fused kernels cannot cap scores
        output, _ = reference_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, cacheclip, **kwargs
        )
        return output, None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cacheclip is None:
        rows = trailing(query.shape[2], key.shape[2], query.device)
    else:
        rows = cacheclip.rows
        cacheclip.observe(int(module.layer_idx), query, key, scaling)

    _, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    output = torch.empty(1, length, heads, width, dtype=query.dtype, device=query.device)
    for start in range(0, length, BLOCK):
        block = rows[start : start + BLOCK]
        size, last = len(block), int(block[-1])
        first = 0 if sliding_window is None else max(0, int(block[0]) - sliding_window + 1)
        folded = query[:, :, start : start + size].reshape(1, kv_heads, groups * size, width)
        mask = None
        if size > 1:  # a single row sees every key that is left
            mask = visible(block - first, last + 1 - first, sliding_window).repeat(groups, 1)
        part = F.scaled_dot_product_attention(
            folded, key[:, :, first : last + 1], value[:, :, first : last + 1], attn_mask=mask, scale=scaling
        )
        output[:, start : start + size] = part.reshape(1, heads, size, width).transpose(1, 2)
    return output, None
