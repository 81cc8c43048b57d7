"""Attention with a score modification, for methods that change attention weights instead of stored KV."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...compute import ScoreMod, visible
from .mask import SparseRows


def modified_attention(
    score_mod: ScoreMod,
    sparse: SparseRows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of ``query [1, H, S, D]`` over ``key`` and ``value [1, Hk, N, D]`` with the weights of ``score_mod``.

    The scores of a block of rows are materialised in float32, since these methods compute few rows.
    Returns ``[1, S, H, D]`` in the queries' dtype.
    """
    kv_heads = key.shape[1]
    # [Hk, G, S, D] x [Hk, 1, N, D]: the G = H / Hk query heads of a KV head share its keys.
    queries = query[0].float().unflatten(0, (kv_heads, -1))
    keys, values = key[0].float().unsqueeze(1), value[0].float().unsqueeze(1)

    def blocks() -> Iterator[tuple[Tensor, Tensor]]:
        for start, stop, *_ in sparse.blocks:
            logits = queries[:, :, start:stop] @ keys.mT * scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            rows = sparse.rows[start:stop]
            yield logits.masked_fill_(~visible(rows, key.shape[2], sliding_window), float("-inf")), rows

    plan = score_mod.prepare(blocks())
    parts = [score_mod.probabilities(logits, rows, plan) @ values for logits, rows in blocks()]
    output = torch.cat(parts, dim=2).flatten(0, 1)  # [H, S, D]
    return output.transpose(0, 1)[None].to(query.dtype)
