"""The implementation for GPUs: our Triton kernel for scattered rows, PyTorch's fused attention for the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .mask import SparseRows, trailing
from .sdpa import sdpa_attention


def triton_attention(
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

    A whole prompt (an ordinary triangle), a single decoded row, texts separated by floors, and score modifications go
    through `sdpa_attention`: the kernel saves the rows that are left out, and one row would leave most of a tile empty.
    Returns ``([1, S, H, D], None)``, equal to `reference_attention` up to rounding.
    """
    sparse = cacheclip or trailing(query.shape[2], key.shape[2], query.device, query.shape[0])
    layer = int(module.layer_idx)
    triangle = sparse.dense and sliding_window is None and softcap is None
    if triangle or query.shape[2] == 1 or sparse.floors is not None or sparse.score_mod_of(layer) is not None:
        return sdpa_attention(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, sparse, **kwargs
        )
    from .q_sparse import q_sparse_attention  # needs triton

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    sparse.before_attention(layer, query, scaling)
    return q_sparse_attention(query, key, value, sparse.rows, scaling, sliding_window, softcap), None
