"""Shapes that the Triton kernel must get right, for its tests and for benchmarks/gpu.py."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cacheclip_rag.model.attention import SparseRows, reference_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative error, by dtype."""


def distance(a: Tensor, b: Tensor) -> float:
    """Relative error of ``a``."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def scattered(count: int, keys: int) -> list[int]:
    return torch.randperm(keys, generator=torch.Generator().manual_seed(3))[:count].sort().values.tolist()


Case = tuple[int, int, int, int, Sequence[int], Any, Any]
"""H, Hk, D, N, rows, window, softcap."""

CASES: dict[str, Case] = {  # a tile is 64 rows and as many keys
    "scattered": (2, 1, 16, 150, scattered(70, 150), None, None),
    "contiguous": (2, 2, 16, 130, range(60, 130), None, None),
    "all": (1, 1, 16, 100, range(100), None, None),
    "one tile exactly": (1, 1, 64, 128, range(64, 128), None, None),
    "the last slot alone": (2, 1, 64, 129, [128], None, None),
    "the first slot alone": (2, 1, 16, 40, [0], None, None),
    "far apart": (1, 1, 16, 200, [0, 64, 199], None, None),
    "six heads share keys of width 80": (6, 1, 80, 70, scattered(9, 70), None, None),
    "wide heads, small tiles": (2, 2, 256, 70, scattered(40, 70), None, None),
    "window": (2, 1, 16, 200, scattered(70, 200), 20, None),
    "window behind the first tile of keys": (1, 1, 16, 200, [0, 1, 150, 199], 9, None),
    "window of one": (1, 1, 16, 70, scattered(9, 70), 1, None),
    "window over everything": (1, 1, 16, 70, scattered(9, 70), 100, None),
    "capped": (2, 1, 16, 70, scattered(20, 70), None, 2.0),
    "capped in a window": (2, 1, 16, 70, scattered(20, 70), 20, 2.0),
}


def both(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernel and what the oracle compute, ``[1, S, H, D]``; slots behind the last row hold NaN."""
    from cacheclip_rag.model.attention.q_sparse import q_sparse_attention

    heads, kv_heads, width, keys, slots, window, softcap = case
    generator, rows = torch.Generator().manual_seed(1), torch.tensor(list(slots))
    # As in a model: queries of a transposed view, keys of a buffer that is longer than what is written.
    query = (2 * torch.randn(1, len(rows), heads, width, generator=generator)).to(device, dtype).transpose(1, 2)
    key, value = (torch.randn(1, kv_heads, keys + 9, width, generator=generator).to(device, dtype) for _ in range(2))
    expected, _ = reference_attention(
        SimpleNamespace(layer_idx=0),
        *(query, key[:, :, :keys], value[:, :, :keys], None, 0.3),
        sliding_window=window,
        softcap=softcap,
        cacheclip=SparseRows(rows, device),
    )
    for buffer in (key, value):
        buffer[:, :, slots[-1] + 1 :] = torch.nan  # nobody may look there
    ours = q_sparse_attention(query, key[:, :, :keys], value[:, :, :keys], rows.to(device), 0.3, window, softcap)
    return ours, expected
