"""The default implementation: PyTorch's fused attention, block by block of rows, over the keys each block can see."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask import SparseRows, trailing
from .modified import modified_attention
from .reference import reference_attention
from .two_parts import in_two_parts, splittable

APART = 2048
"""Keys before a block's first row from which on the block is computed in two parts, so that they need no mask."""


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
    cacheclip: SparseRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Sparse causal attention of ``query [1, H, S, D]`` over ``key`` and ``value [1, Hk, N, D]``.

    Rows are sorted, so a block needs only the keys from its floor (or its sliding window) up to its last row's slot. In
    grouped-query models the H / Hk query heads of a KV head are folded into the rows: K and V are not repeated, and the
    fused kernel gets long blocks of queries, which it is fast with.
    Returns ``([1, S, H, D], None)``, equal to `reference_attention` up to rounding.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sparse = cacheclip or trailing(query.shape[2], key.shape[2], query.device, query.shape[0])
    layer = int(module.layer_idx)
    if (score_mod := sparse.score_mod_of(layer)) is not None:
        sparse.before_attention(layer, query, scaling)
        return modified_attention(score_mod, sparse, query, key, value, scaling, sliding_window, softcap), None
    if softcap is not None:  # the fused kernels cannot cap scores
        output, _ = reference_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, cacheclip, **kwargs
        )
        return output, None
    sparse.before_attention(layer, query, scaling)

    _, heads, length, width = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    if sparse.dense and sliding_window is None and length > 1:
        whole = F.scaled_dot_product_attention(
            query, key[:, :, :length], value[:, :, :length], is_causal=True, scale=scaling, enable_gqa=groups > 1
        )
        return whole.transpose(1, 2), None
    output = torch.empty(1, length, heads, width, dtype=query.dtype, device=query.device)
    for start, stop, first, last, floor in sparse.blocks:
        keys = slice(floor if sliding_window is None else max(floor, first - sliding_window + 1), last + 1)
        folded = query[:, :, start:stop].reshape(1, kv_heads, groups * (stop - start), width)
        if stop - start == 1:  # a single row sees all of these keys and needs no mask
            part = F.scaled_dot_product_attention(folded, key[:, :, keys], value[:, :, keys], scale=scaling)
        elif sliding_window is None and first - keys.start >= APART and splittable(query, key, value):
            tail = slice(first, last + 1)
            bias = sparse.bias(start, stop, tail, groups, None, query.dtype)
            part = in_two_parts(folded, key, value, slice(keys.start, first), tail, bias, scaling)
        else:
            bias = sparse.bias(start, stop, keys, groups, sliding_window, query.dtype)
            part = F.scaled_dot_product_attention(
                folded, key[:, :, keys], value[:, :, keys], attn_mask=bias, scale=scaling
            )
        output[:, start:stop] = part.reshape(1, heads, stop - start, width).transpose(1, 2)
    return output, None
