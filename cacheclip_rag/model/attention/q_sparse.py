"""The Triton kernel of sparse causal attention; imported on use only, because it needs triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def q_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q k^T * scaling + mask) v``, where row i sees the slots up to ``rows[i]``; no S x N matrix is stored.

    ``query [1, H, S, D]``, ``key`` and ``value [1, Hk, N, D]`` of one dtype (float32, bfloat16, float16) on one device;
    ``rows [S]`` int64, strictly increasing and below N, which is not checked, to avoid a device synchronisation.
    ``window``: a sliding window's width in tokens. Returns ``[1, S, H, D]`` in the queries' dtype.
    Source: Q-Sparse-Attn of FusionRAG (arXiv 2601.12904); sliding windows and soft capping are added.
    """
    _, heads, length, width = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    output = torch.empty(1, length, heads, width, dtype=query.dtype, device=query.device)
    tile, padded = tile_of(width, query.element_size())
    with torch.cuda.device_of(query):  # Triton launches on the current device, wherever the tensors are
        kernel[(triton.cdiv(length, tile), heads)](
            *(query, key, value, rows.contiguous(), output),
            *(query.stride(1), query.stride(2), key.stride(1), key.stride(2), value.stride(1), value.stride(2)),
            *(length, scaling),
            GROUPS=heads // key.shape[1],
            WIDTH=width,
            PADDED=padded,
            TILE=tile,
            WINDOW=window,
            SOFTCAP=softcap,
            num_stages=2,
        )
    return output


def tile_of(width: int, bytes_each: int) -> tuple[int, int]:
    """The tile size (rows, and keys per step), and the head dimension ``width`` padded to a power of two.

    64 as published, or less: a tile of queries and two stages of keys and values must fit into the shared memory of a
    small GPU (99 KiB), so that a tile takes at most 16 KiB.
    """
    padded = max(16, triton.next_power_of_2(width))  # 16 is the least that `tl.dot` multiplies
    return max(16, min(64, 16384 // (padded * bytes_each))), padded


@triton.jit(do_not_specialize=["length"])  # it differs in every request, which would compile a kernel for each
def kernel(
    query,
    key,
    value,
    rows,
    output,
    query_head,
    query_row,
    key_head,
    key_slot,
    value_head,
    value_slot,
    length,
    scaling,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Attention of one tile of rows of one query head. Arguments are pointers, strides in elements, ``length`` = S."""
    start, head = tl.program_id(0) * TILE, tl.program_id(1)
    kv_head = (head // GROUPS).to(tl.int64)
    lanes = tl.arange(0, PADDED)
    real = lanes < WIDTH

    # Rows beyond the last one repeat it and are not stored: every row sees at least itself.
    index = start + tl.arange(0, TILE)
    within = index < length
    index = tl.minimum(index, length - 1).to(tl.int64)
    slots = tl.load(rows + index).to(tl.int32)
    first = tl.load(rows + start).to(tl.int32)
    last = tl.load(rows + tl.minimum(start + TILE, length) - 1).to(tl.int32)
    q = tl.load(
        query + head.to(tl.int64) * query_head + index[:, None] * query_row + lanes[None, :],
        mask=real[None, :],
        other=0.0,
    )

    low = 0
    if WINDOW is not None:
        low = tl.maximum(first - WINDOW + 1, 0)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    mixed = tl.zeros([TILE, PADDED], tl.float32)
    for begin in range(low, last + 1, TILE):
        columns = begin + tl.arange(0, TILE)
        there = columns <= last  # later slots may not be written yet
        offset = columns.to(tl.int64)
        k = tl.load(
            key + kv_head * key_head + offset[None, :] * key_slot + lanes[:, None],
            mask=there[None, :] & real[:, None],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scaling
        if SOFTCAP is not None:
            scores = SOFTCAP * (2.0 * tl.sigmoid(2.0 * scores / SOFTCAP) - 1.0)  # tanh
        seen = columns[None, :] <= slots[:, None]
        if WINDOW is not None:
            seen &= columns[None, :] > slots[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(peak, tl.max(scores, axis=1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a late row's window may begin behind this tile
        powers = tl.exp(scores - anchor[:, None])
        fade = tl.exp(peak - anchor)
        v = tl.load(
            value + kv_head * value_head + offset[:, None] * value_slot + lanes[None, :],
            mask=there[:, None] & real[None, :],
            other=0.0,
        )
        mixed = tl.dot(powers.to(v.dtype), v, mixed * fade[:, None], input_precision="ieee")
        total = total * fade + tl.sum(powers, axis=1)
        peak = higher

    place = (index[:, None] * tl.num_programs(1) + head) * WIDTH + lanes[None, :]
    tl.store(output + place, (mixed / total[:, None]).to(output.dtype.element_ty), mask=within[:, None] & real[None, :])
