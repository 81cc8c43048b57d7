"""Attention over two ranges of keys, each with a softmax of its own, put together by their log-sum-exps.

Keys before the first row of a block are visible to all of its rows. Only the others need a mask: with one over all
keys, a block of a long context builds and reads more mask than keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""The CPU kernel behind `torch.nn.functional.scaled_dot_product_attention`; it alone returns the log-sum-exp."""


def splittable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `in_two_parts` can compute these: on a CPU, values as wide as keys, both contiguous in that dimension."""
    tensors = (query, key, value)
    return (
        _FUSED is not None
        and query.device.type == "cpu"
        and query.shape[-1] == value.shape[-1]
        and all(one.stride(-1) == 1 for one in tensors)
    )


def in_two_parts(
    query: Tensor, key: Tensor, value: Tensor, seen: slice, masked: slice, bias: Tensor, scaling: float
) -> Tensor:
    """Attention ``[1, H, S, D]`` of ``query [1, H, S, D]`` over the keys ``seen``, all visible, and ``masked``.

    ``key`` and ``value [1, H, N, D]``. ``bias [S, masked keys]`` is added to the scores of the second range; every row
    must see one key of it at least. The merge, FlashAttention's (arXiv 2205.14135, section 3.1), is in float32.
    """
    assert _FUSED is not None
    first, of_first = _FUSED(query, key[:, :, seen], value[:, :, seen], scale=scaling)
    second, of_second = _FUSED(query, key[:, :, masked], value[:, :, masked], attn_mask=bias, scale=scaling)
    share = torch.sigmoid(of_first.float() - of_second.float())[..., None]
    return torch.lerp(second.float(), first.float(), share).to(query.dtype)
