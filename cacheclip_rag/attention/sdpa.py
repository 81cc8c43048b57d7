"""The default implementation: PyTorch's fused attention over blocks of rows, each against the keys it can see."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import Sparse, trailing
from .reference import reference_attention


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

    Rows are sorted, so a block of them needs keys only from where its window begins up to its last row's slot. In
    grouped-query models the H / Hk query heads of a KV head see one expanded view of its keys; nothing is repeated.
    Returns ``([1, S, H, D], None)``, equal to `reference_attention` up to rounding.
    """
    if softcap is not None:  # the fused kernels cannot cap scores
        output, _ = reference_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, cacheclip, **kwargs
        )
        return output, None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sparse = cacheclip or trailing(query.shape[2], key.shape[2], query.device)
    sparse.observe(int(module.layer_idx), query, key, scaling)

    _, heads, length, width = query.shape
    kv_heads = key.shape[1]
    grouped = (kv_heads, heads // kv_heads)
    q = query[0].unflatten(0, grouped)  # [Hk, H / Hk, S, D]
    k, v = (tensor[0].unsqueeze(1).expand(*grouped, -1, -1) for tensor in (key, value))
    if sparse.dense and sliding_window is None and length > 1:
        whole = F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length], is_causal=True, scale=scaling)
        return whole.flatten(0, 1).transpose(0, 1).unsqueeze(0), None
    output = torch.empty(1, length, heads, width, dtype=query.dtype, device=query.device)
    for start, stop, first, last in sparse.blocks:
        keys = slice(0 if sliding_window is None else max(0, first - sliding_window + 1), last + 1)
        # A single row sees every key that is left.
        bias = sparse.bias(start, stop, keys, sliding_window, query.dtype) if stop - start > 1 else None
        part = F.scaled_dot_product_attention(
            q[:, :, start:stop], k[:, :, keys], v[:, :, keys], attn_mask=bias, scale=scaling
        )
        output[0, start:stop] = part.flatten(0, 1).transpose(0, 1)
    return output, None
